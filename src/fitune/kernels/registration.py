"""Making an operator `fitune::NAME` of torch.library: schema, fake, and the choice of an implementation.

The last argument of every operator is `backend`, an explicit value handed down from the plan. Under fake tensors only
the fake runs, whatever the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "fitune"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def operator(schema: str, run: Callable[..., Any]) -> Any:
    """Defines the operator of this schema, which does what `run` does; the decorated function is its fake."""
    name = schema.split("(")[0]

    def register(fake: Any) -> Any:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fitune::{name}", lambda *arguments: fake(*arguments[:-1]), lib=_LIBRARY)
        return getattr(torch.ops.fitune, name).default

    return register


def native_where_taken(native: ModuleType, reference: ModuleType) -> Callable[[str], Any]:
    """A decorator as `operator`, for functions of the schema's name in two modules.

    What `native.takes` refuses goes to the reference, which is told the backend as its last argument.
    """

    def define(schema: str) -> Any:
        name = schema.split("(")[0]
        ours: Callable[..., Any] = getattr(native, name)
        theirs: Callable[..., Any] = getattr(reference, name)

        def run(*arguments: Any) -> Any:
            *values, backend = arguments
            if backend == "native" and native.takes(*values):
                return ours(*values)
            return theirs(*values, backend)

        return operator(schema, run)

    return define
