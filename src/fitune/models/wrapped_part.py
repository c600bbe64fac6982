"""Modules that an adapter keeps a trained copy of, beside the original (PEFT's `modules_to_save`)."""

from __future__ import annotations

from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def in_use(module: nn.Module) -> nn.Module:
    """What computes when `module` is called now: its trained copy, or itself."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    if module.disable_adapters or not module.active_adapters:
        return original(module)
    return module.modules_to_save[module.active_adapters[0]]


def original(module: nn.Module) -> nn.Module:
    """The base's own module, which does not learn."""
    found: nn.Module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return found
