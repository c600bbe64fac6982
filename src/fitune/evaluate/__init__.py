"""Evaluation: how good a model is at its task, how sure that is, and the report that shows it."""

from fitune.evaluate.intervals import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
    proportion_interval,
)

__all__ = ["Interval", "PairedDifference", "bootstrap_interval", "paired_difference", "proportion_interval"]
