"""A run's records as numbers by name, as TensorBoard and other programs show them."""

from __future__ import annotations

from fitune.train.loop import Record, ValidationRecord
from fitune.train.scoring import ScoreRecord


def scalars_of(record: Record) -> dict[str, float]:
    """`train/loss`, `validation/loss`, `score/bleu` and so on; without what there is none of."""
    if isinstance(record, ScoreRecord):
        return {f"score/{name}": value for name, value in record.scores.items()}
    if isinstance(record, ValidationRecord):
        found: dict[str, float | None] = {
            "validation/loss": record.validation_loss,
            "validation/reward_accuracy": record.validation_reward_accuracy,
            "validation/reward_margin": record.validation_reward_margin,
        }
    else:
        found = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/reward_accuracy": record.reward_accuracy,
            "train/reward_margin": record.reward_margin,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/machine_share": record.machine_share,
            "memory/resident_bytes": float(record.memory_bytes),
        }
    return {name: value for name, value in found.items() if value is not None}
