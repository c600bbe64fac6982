"""AdamW with both moments in 8 bits (Dettmers et al., arXiv 2110.02861): 2 bytes of state a parameter and not 8."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fitune.kernels import contract
from fitune.quant.moments import MAPS
from fitune.step.fresh_states import fresh_adamw8bit, in_memory


class AdamW8bit(torch.optim.Optimizer):
    """The learning rate is set by every step. Parameters and gradients are float32.

    A parameter's state: `step`, and `codes1`, `codes2` [n] uint8 with `absmax1`, `absmax2` [ceil(n / 256)] float32;
    or, where it has fewer than `LEAST_8BIT_SIZE` values, `moment1` and `moment2` in its own shape.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], betas: tuple[float, float], weight_decay: float, backend: str,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.backend = backend
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Changes every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(fresh_adamw8bit(parameter, in_memory(parameter.device)))
                state["step"] += 1
                self._update(parameter, state, group)

    def _update(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        rate, eps = group["lr"], group["eps"]
        keep = 1 - rate * group["weight_decay"]
        step_size = rate / (1 - beta1 ** state["step"])
        correction = math.sqrt(1 - beta2 ** state["step"])
        grad = parameter.grad
        assert grad is not None
        if "codes1" in state:
            map1, map2 = (words.to(parameter.device) for words in MAPS)
            contract.adamw8bit_(
                parameter, grad.contiguous(), state["codes1"], state["codes2"], state["absmax1"], state["absmax2"],
                map1, map2, [beta1, 1 - beta1, beta2, 1 - beta2, eps, keep, step_size, correction], self.backend,
            )  # fmt: skip
            return
        first: Tensor = state["moment1"].mul_(beta1).add_(grad, alpha=1 - beta1)
        second: Tensor = state["moment2"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(keep).addcdiv_(first, (second.sqrt() / correction).add_(eps), value=-step_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which makes float32 of every tensor: codes become bytes again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("codes1", "codes2"):
                if name in state:
                    state[name] = state[name].to(torch.uint8)
