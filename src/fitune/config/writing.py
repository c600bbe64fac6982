"""A `RunConfig` back into a run file that reproduces it."""

from __future__ import annotations

from typing import Any

import yaml

from fitune.config.schema import RunConfig


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text with line breaks and the like is quoted and escaped: YAML's other styles fold some of them."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _plain(value: Any) -> Any:
    """Tuples, which YAML's safe types do not have, as lists."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def dump(config: RunConfig) -> str:
    """YAML text that `load` turns into an equal config; defaults are written out, so that they stay.

    Left out are the fields that another one rules out: the adapter's with method full, epochs beside steps.
    """
    values = _plain(config.model_dump(mode="python"))
    if config.method == "full":
        del values["lora"]
    if config.train.steps is not None:
        del values["train"]["epochs"]
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")))
