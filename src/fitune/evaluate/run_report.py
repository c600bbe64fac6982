"""What a run's report shows, as plain data: filled by whoever trained or evaluated, drawn by html_report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fitune.evaluate.intervals import Interval, PairedDifference


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a list of facts: a name and its value, in words."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score before and after training.

    Attributes:
        name: 'Execution accuracy, unseen values'.
        base, tuned: None where it was not measured.
        difference: tuned minus base on the same items, if compared.
        scale: "share" for 0 to 1, shown in percent; "number" as it is (BLEU, perplexity).
        better: in which direction the score improves.
    """

    name: str
    base: Interval | None
    tuned: Interval | None
    difference: PairedDifference | None = None
    scale: Literal["share", "number"] = "share"
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A number as planned and as measured, with units, and where the planned one came from."""

    name: str
    planned: str
    measured: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its reference answer and the answers before and after (`*_right` None: not judged).

    `note` is for what a reader needs to know, such as the database's error message.
    """

    question: str
    reference: str
    base: str | None
    tuned: str | None
    base_right: bool | None = None
    tuned_right: bool | None = None
    group: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class FormRow:
    """How many of `count` questions of one form were right (None: not measured); `group` is their set."""

    form: str
    count: int
    base_right: int | None
    tuned_right: int | None
    group: str = ""


@dataclass(frozen=True, slots=True)
class RunReport:
    """Everything in a run's report; whatever is empty is left out of the page.

    Attributes:
        title, subtitle: the page's heading and the line under it.
        finished: when, as it shall be printed.
        summary: one or two sentences with the result.
        trained: what was trained: model, method, data, tokens, time.
        warnings: what the reader must know to read the numbers rightly, one sentence each.
        scores, forms, examples: the proof.
        train_loss, validation_loss, learning_rate: (step, value) points; the loss in nats a trained token.
        planned: plan against measurement.
        environment: machine, versions, kernels in use.
        config_yaml: the configuration that reproduces the run.
        commands: what to run next, as (what it does, command).
    """

    title: str
    subtitle: str = ""
    finished: str = ""
    summary: str = ""
    trained: Sequence[Fact] = ()
    warnings: Sequence[str] = ()
    scores: Sequence[ScoreRow] = ()
    forms: Sequence[FormRow] = ()
    examples: Sequence[Example] = ()
    train_loss: Sequence[tuple[float, float]] = ()
    validation_loss: Sequence[tuple[float, float]] = ()
    learning_rate: Sequence[tuple[float, float]] = ()
    planned: Sequence[PlannedRow] = ()
    environment: Sequence[Fact] = ()
    config_yaml: str = ""
    commands: Sequence[tuple[str, str]] = ()
