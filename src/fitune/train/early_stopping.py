"""When to stop before the end: validation that no longer gets better; and where a model begins to learn by heart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Validations in a row above the best one, while the training loss fell, before it is called overfitting.
RISES = 2


@dataclass
class EarlyStopping:
    """Hears of every validation.

    Attributes:
        patience: after so many validations in a row without a better loss the run ends; None: never.
        min_delta: how much less a loss must be to count as better.
        best, best_step: the best loss so far, and the step after which it was.
        waited: validations since.
    """

    patience: int | None = None
    min_delta: float = 0.0
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    _best_train: float = math.inf
    _told: bool = field(default=False, repr=False)

    def hear(self, step: int, loss: float, train_loss: float = math.nan) -> bool:
        """Takes a validation loss, and the training loss of late; whether this is the best so far."""
        if loss < self.best - self.min_delta or not math.isfinite(self.best):
            self.best, self.best_step, self.waited, self._best_train = loss, step, 0, train_loss
            return True
        self.waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self.waited >= self.patience

    def overfitting(self, loss: float, train_loss: float) -> str | None:
        """A sentence, once, where validation rises while training falls; for the last loss that was heard."""
        if self._told or self.waited < RISES or loss <= self.best or not train_loss < self._best_train:
            return None
        self._told = True
        return (
            f"since step {self.best_step} the validation loss rises ({self.best:.4f} then, {loss:.4f} now) while the "
            "training loss falls: the model begins to learn the data by heart. Fewer epochs, lora.dropout or "
            "train.early_stopping_patience end it there; train.restore_best keeps the best"
        )

    def why(self) -> str:
        """The sentence for a run that ended."""
        return (
            f"stopped early: {self.waited} validations in a row were not better by {self.min_delta:g} than the loss "
            f"{self.best:.4f} after step {self.best_step}"
        )
