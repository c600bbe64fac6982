"""When to stop before the end: validation that no longer gets better; and where a model begins to learn by heart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Validations in a row above the best one, while the training loss fell, before it is called overfitting.
RISES = 2


@dataclass
class EarlyStopping:
    """Hears of every validation, or of every score.

    Attributes:
        patience: after so many in a row without a better value the run ends; None: never.
        min_delta: by how much a value must be better to count as that.
        by_score: whether the values are scores, of which more is better; else losses.
        best, best_step: the best value so far, and the step after which it was.
        waited: values since.
    """

    patience: int | None = None
    min_delta: float = 0.0
    by_score: bool = False
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    _best_train: float = math.inf
    _told: bool = field(default=False, repr=False)

    def hear(self, step: int, loss: float, train_loss: float = math.nan) -> bool:
        """Takes a validation loss (or a score), and the training loss of late; whether this is the best so far."""
        is_better = loss > self.best + self.min_delta if self.by_score else loss < self.best - self.min_delta
        if is_better or not math.isfinite(self.best):
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
        heard, value = ("scores", "score") if self.by_score else ("validations", "loss")
        return (
            f"stopped early: {self.waited} {heard} in a row were not better by {self.min_delta:g} than the {value} "
            f"{self.best:.4f} after step {self.best_step}"
        )
