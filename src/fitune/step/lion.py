"""Lion (Chen et al., arXiv 2302.06675, program 1): steps of equal size by a momentum's sign, 4 bytes of state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fitune.step.fresh_states import fresh_lion, in_memory


class Lion(torch.optim.Optimizer):
    """The learning rate is set by every step. A parameter's state: `step`, and `momentum` in its own shape."""

    def __init__(
        self, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], betas: tuple[float, float],
        weight_decay: float,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Changes every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(fresh_lion(parameter, in_memory(parameter.device)))
                state["step"] += 1
                momentum = state["momentum"]
                direction = torch.lerp(grad, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(grad, 1 - beta2)
