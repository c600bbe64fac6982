"""What a loss is multiplied by before its backward pass, so that gradients in float16 are not lost to zero.

float16 has numbers down to 6e-8, and gradients of activations are often smaller. Multiplied by a power of two they
are kept, and the gradients of the weights, which are float32, are divided by it again: no bit of them changes. Where
one overflows, half as much is taken and the step computed again, so that no data are left out. After Micikevicius
et al., Mixed Precision Training, 2017, https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass

# torch.amp.GradScaler's own: where it begins, and after how many steps without an overflow it is doubled.
FIRST = 2.0**16
STEPS_TO_GROW = 2000
LARGEST = 2.0**24


@dataclass
class LossScale:
    """A power of two that follows what overflows.

    Attributes:
        value: what losses are multiplied by.
        steps: how many steps in a row nothing overflowed.
    """

    value: float = FIRST
    steps: int = 0

    def fall(self) -> bool:
        """After gradients that overflowed: half as much; False where it is 1 already."""
        if self.value <= 1.0:
            return False
        self.value, self.steps = self.value / 2, 0
        return True

    def note_step(self) -> None:
        """After a step whose gradients were finite."""
        self.steps += 1
        if self.steps >= STEPS_TO_GROW and self.value < LARGEST:
            self.value, self.steps = self.value * 2, 0
