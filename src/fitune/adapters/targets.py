"""Which layers get an adapter. We list them ourselves: PEFT's `all-linear` skips in silence what it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from fitune.errors import InputError


def target_names(model: nn.Module, head: str, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt.

    Args:
        head: name of the output head, never part of "all-linear".
        targets: "all-linear", or names as in the model ("q_proj", or longer ends of a full name).

    Raises:
        InputError: for names that match no linear layer, with the names there are.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        return [name for name in linears if name != head]
    chosen: dict[str, None] = {}
    problems = []
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    for target in [targets] if isinstance(targets, str) else targets:
        found = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not found:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{target!r} matches no linear layer{hint} (there are: {', '.join(known)})")
        chosen.update(dict.fromkeys(found))
    if problems:
        raise InputError(problems, where="lora.targets")
    return list(chosen)
