"""What a run shows while it trains: a live bar on a terminal, a few plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fitune.train.loop import Record, StepRecord, ValidationRecord
from fitune.train.scoring import ScoreRecord, score_in_words

# The loss of a step depends on its few rows; a mean of so many steps shows where it goes.
AVERAGED_STEPS = 20
LINE_EVERY_SECONDS = 10.0
LINE_EVERY_SHARE = 0.1
# Bounds the lines of a long run, whatever its pace.
LEAST_SHARE = 0.03
MOST_LINES = 40


def clock(seconds: float) -> str:
    """`0:07`, `12:40`, `3:05:00`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingView:
    """Shows a run's records; a context manager that is handed over as `watch`.

    Args:
        steps: of the whole run.
        planned_peak_bytes: what the plan expects, to show memory against.
        console: where to (None: stderr).
    """

    def __init__(self, steps: int, planned_peak_bytes: int, console: Console | None = None) -> None:
        self._steps = max(1, steps)
        self._planned = planned_peak_bytes
        self._console = console or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._losses: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._last: StepRecord | None = None
        self._validation: float | None = None
        self._score: ScoreRecord | None = None
        self._pace: tuple[float, int] = (0.0, 0)
        self._store: tuple[int, int] | None = None
        self._line_at, self._line_step, self._lines = 0.0, 0, 0

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()

    def __call__(self, record: Record) -> None:
        """Takes one record of the run."""
        if isinstance(record, ValidationRecord):
            self._validation = record.validation_loss
            # The others stand in the next line about a step.
            if self._live is None and record.step >= self._steps:
                self._line(f"step {record.step}/{self._steps}  validation loss {record.validation_loss:.4f}")
        elif isinstance(record, ScoreRecord):
            self._score = record
            if self._live is None and record.step >= self._steps:
                self._line(f"step {record.step}/{self._steps}  {score_in_words(vars(record))}")
        else:
            self._last, self._store = record, None
            self._losses.append(record.loss)
            seconds, count = self._pace
            self._pace = (seconds + record.tokens / max(1e-9, record.tokens_per_second), count + 1)
            if self._live is None and self._is_due(record.step):
                self._line(", ".join(self._facts(record)), record.step)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def quantising(self, done: int, total: int) -> None:
        """Progress of making the store: tensors done, and in all."""
        self._store = (done, total)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
        elif done in (1, total):
            what = "done" if done == total else "begun; this happens once a model"
            self._line(f"quantising {total} tensors to NF4: {what}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(Text(line))

    def _is_due(self, step: int) -> bool:
        if step >= self._steps or self._lines == 0 or self._line_step == 0:
            return True
        share = (step - self._line_step) / self._steps
        waited = time.monotonic() - self._line_at >= LINE_EVERY_SECONDS
        return share >= LINE_EVERY_SHARE or (waited and share >= LEAST_SHARE)

    def _line(self, text: str, step: int | None = None) -> None:
        # Not through rich: it would break a long line at a width that a file has not.
        self._console.file.write(f"{text}\n")
        self._console.file.flush()
        self._line_at, self._lines = time.monotonic(), self._lines + 1
        if step is not None:
            self._line_step = step

    def _left_seconds(self, step: int) -> float:
        seconds, count = self._pace
        return seconds / max(1, count) * (self._steps - step)

    def _facts(self, record: StepRecord) -> list[str]:
        mean = sum(self._losses) / len(self._losses)
        facts = [f"step {record.step}/{self._steps}", f"loss {record.loss:.4f} (mean {mean:.4f})"]
        if self._validation is not None:
            facts.append(f"validation {self._validation:.4f}")
        if self._score is not None:
            facts.append(score_in_words(vars(self._score)))
        if record.reward_accuracy is not None and record.reward_margin is not None:
            facts.append(f"{record.reward_accuracy:.0%} judged right (margin {record.reward_margin:+.3f})")
        speed = f"{record.tokens_per_second:,.0f} tokens/s"
        if record.machine_share is not None:
            speed += f" ({record.machine_share:.0%} of the machine's products)"
        return [
            *facts,
            f"learning rate {record.learning_rate:.2e}",
            f"gradient norm {record.grad_norm:.3g}",
            speed,
            f"memory {record.memory_bytes / 1e9:.2f} of {self._planned / 1e9:.2f} GB planned",
            f"{clock(record.seconds)} gone, {clock(self._left_seconds(record.step))} left",
        ]

    def _picture(self) -> Group:
        row = Table.grid(padding=(0, 1))
        if self._last is None:
            done, total = self._store or (0, 0)
            what = f"quantising {done}/{total} tensors to NF4" if self._store else "building the model"
            row.add_row(Text(what), ProgressBar(total=max(1, total), completed=done, width=30))
            return Group(row)
        step, *facts = self._facts(self._last)
        room = self._console.width - len(step) - len(facts[-1]) - 2
        bar = ProgressBar(total=self._steps, completed=self._last.step, width=max(5, min(30, room)))
        row.add_row(Text(step, style="bold"), bar, Text(facts[-1]))
        return Group(row, *map(Text, self._folded(facts[:-1])))

    def _folded(self, facts: list[str]) -> list[str]:
        """Lines of facts that are no wider than the terminal, unless one fact alone is."""
        lines = [facts[0]]
        for fact in facts[1:]:
            longer = f"{lines[-1]} · {fact}"
            if len(longer) <= self._console.width:
                lines[-1] = longer
            else:
                lines.append(fact)
        return lines
