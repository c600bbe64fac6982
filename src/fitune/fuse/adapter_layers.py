"""Which fused layer an adapter's settings ask for: what PEFT's custom-module hook is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from fitune.fuse.dora_linear import FusedDoraLinear, UnmeasuredDoraLinear
from fitune.fuse.lora_linear import FusedLoraLinear
from fitune.models.graph import is_plain_linear

# Other LoRA variants change the formula; PEFT's own layers handle them.
_VARIANTS = (
    "arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "mica",
    "kasa_config", "lora_bias", "fan_in_fan_out", "use_qalora",
)  # fmt: skip


def fused_lora_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """A fused LoRA or DoRA layer on `target`, or None for a variant that neither covers."""
    return _made(FusedDoraLinear, target, adapter_name, config, **kwargs)


def unmeasured_lora_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The same for dry runs: no weight is read."""
    return _made(UnmeasuredDoraLinear, target, adapter_name, config, **kwargs)


def _made(
    dora: type[FusedDoraLinear], target: nn.Module, adapter_name: str, config: Any, **kwargs: Any
) -> nn.Module | None:  # fmt: skip
    if any(getattr(config, name, None) for name in _VARIANTS) or config.init_lora_weights is not True:
        return None
    if not is_plain_linear(target):
        return None
    kind = dora if config.use_dora else FusedLoraLinear
    return kind(target, adapter_name, config=config, **kwargs)
