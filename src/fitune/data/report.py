"""What the data is made of and what was done to it: numbers, problems with file and line, and a view of the mask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fitune.data.conversation import Origin
from fitune.data.encoding import EncodedSample

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

SHOWN_PROBLEMS = 20
SHOWN_SAMPLES = 2
# A view is for eyes: longer runs of one kind are shown by their ends.
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that was read: its path, the format its records have, how many there are.

    `epoch_samples`: how many samples of a training epoch are of it, after weights and shares and what is held out;
    `is_validation`: whether it is only validated on.
    """

    path: str
    format: str
    samples: int
    epoch_samples: int
    is_validation: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about one sample that its owner should know; `file` and `line` (or row, by `unit`) say which one."""

    file: str
    line: int
    message: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens with one flag, as text; `is_worse`: of a preference pair's worse answer."""

    text: str
    is_trained: bool
    tokens: int
    is_worse: bool = False


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample as the model sees it, cut into trained and untrained runs."""

    origin: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """Facts about one set of training data. Counts are of samples where nothing else is said.

    Attributes:
        files: what was read, training files first.
        samples: read from the training files.
        tokens: of those kept, the share held out for validation included; weights do not count.
        trained_tokens: of these, the ones whose log-probability counts.
        train_samples: in one epoch, weights applied.
        validation_samples: held out, or read from the validation file.
        cut: shortened by the over-length policy.
        dropped: left out by the over-length policy.
        split: plain texts that go on in further samples.
        empty: with an answer that is empty; they are kept.
        duplicates: equal to an earlier one; they are kept, and never on both sides of a split.
        leaked: validation samples that are also training samples.
        without_end_token: with a trained answer whose end-of-turn token is not trained, cut ones aside.
        end_token_share: of the samples kept, those whose trained turns all end with a trained end-of-turn token.
        nothing_to_train: without a trained token; left out.
        control_tokens_in_text: control tokens that the data itself held, encoded as plain text.
        lost_characters: characters that the tokenizer's vocabulary cannot write.
        row_tokens: the longest a sample may be.
        longest_tokens: the longest sample kept.
        lengths: (at most so many tokens, samples) in ascending order.
        has_default_template: whether the tokenizer had no chat template and the default one was used.
        mojibake: with text that was read in a wrong encoding before it came here.
        control_characters: with characters that are no text.
        mixed_scripts: with a word of letters of two alphabets.
        refused: why this cannot be trained on; empty: it can.
        problems: what was found, with file and line, as far as so many can be kept.
        more_problems: how many others there are.
        views: the first samples with their mask.
        kept_in: the folders in which the tokens of large files are kept, for the next run.
    """

    files: tuple[SourceFile, ...]
    samples: int
    tokens: int
    trained_tokens: int
    train_samples: int
    validation_samples: int
    cut: int
    dropped: int
    split: int
    empty: int
    duplicates: int
    leaked: int
    without_end_token: int
    end_token_share: float
    nothing_to_train: int
    control_tokens_in_text: int
    lost_characters: int
    row_tokens: int
    longest_tokens: int
    lengths: tuple[tuple[int, int], ...]
    has_default_template: bool
    mojibake: int
    control_characters: int
    mixed_scripts: int
    refused: tuple[str, ...]
    problems: tuple[Problem, ...]
    more_problems: int
    views: tuple[SampleView, ...]
    kept_in: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-able values, under the names above."""
        return asdict(self)

    def as_rich(self) -> Group:
        """The report for a terminal. Trained tokens are green, and between ⟦ and ⟧ where there is no colour."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table.grid(padding=(0, 2))
        for name, value in facts_of(self):
            facts.add_row(Text(name), Text(value))
        parts: list[Any] = [facts, Text(), Text("lengths in tokens")]
        most = max((count for _, count in self.lengths), default=1)
        for upper, count in self.lengths:
            parts.append(Text(f"  up to {upper:>7,}  {count:>8,}  {'█' * round(30 * count / most)}"))
        if self.refused:
            parts += [Text(), Text("cannot be trained on", style="bold red"), *map(Text, self.refused)]
        if self.problems:
            count = len(self.problems) + self.more_problems
            parts += [Text(), Text(f"{count:,} things to know", style="yellow")]
            parts += [Text(f"  {item}") for item in self.problems[:SHOWN_PROBLEMS]]
            if count > SHOWN_PROBLEMS:
                parts.append(Text(f"  and {count - SHOWN_PROBLEMS:,} more"))
        for view in self.views:
            parts += [
                Text(),
                Text(f"{view.origin}: ⟦trained⟧ and not trained", style="bold"),
                _coloured(view),
            ]
        return Group(*parts)


def facts_of(report: DataReport) -> list[tuple[str, str]]:
    """Name and value of what there is to say in one line each."""
    share = 100 * report.trained_tokens / report.tokens if report.tokens else 0.0
    facts = [
        (
            file.path,
            f"{file.samples:,} samples, format {file.format}; "
            + ("for validation" if file.is_validation else f"{file.epoch_samples:,} in an epoch"),
        )
        for file in report.files
    ]
    facts += [("tokens kept in", folder) for folder in report.kept_in]
    facts += [
        (
            "samples",
            f"{report.samples:,} read; {report.train_samples:,} train, {report.validation_samples:,} validation",
        ),
        ("tokens", f"{report.tokens:,}, of which {report.trained_tokens:,} trained ({share:.1f} %)"),
        ("longest sample", f"{report.longest_tokens:,} tokens; a row holds {report.row_tokens:,}"),
    ]
    if report.has_default_template:
        facts.append(("chat template", "the model has none; the default one (### Instruction:) is used"))
    counts = {
        "cut": report.cut,
        "dropped": report.dropped,
        "split into several": report.split,
        "empty answers": report.empty,
        "duplicates": report.duplicates,
        "in validation and training": report.leaked,
        "without end-of-turn token": report.without_end_token,
        "end-of-turn trained": f"{100 * report.end_token_share:.1f} % of the samples",
        "nothing to train": report.nothing_to_train,
        "control tokens in the data": report.control_tokens_in_text,
        "characters lost by the tokenizer": report.lost_characters,
        "wrong encoding": report.mojibake,
        "control characters": report.control_characters,
        "words of two alphabets": report.mixed_scripts,
    }
    shown = {name: count if isinstance(count, str) else f"{count:,}" for name, count in counts.items()}
    return [*facts, *shown.items()]


def length_histogram(lengths: NDArray[np.uint32]) -> tuple[tuple[int, int], ...]:
    """Lengths in tokens -> (upper bound, how many), in powers of two, without empty ends."""
    if not len(lengths):
        return ()
    powers = np.maximum(4, np.ceil(np.log2(lengths)).astype(np.int64))
    counts = np.bincount(powers)
    return tuple((1 << power, int(counts[power])) for power in range(int(powers.min()), len(counts)))


def view_of(sample: EncodedSample, tokenizer: PreTrainedTokenizerBase) -> SampleView:
    """One encoded sample as text, cut where the trained flag changes, and where a pair's worse answer begins."""
    pieces = []
    start = 0
    for end in range(1, len(sample) + 1):
        if end in (len(sample), sample.worse_from) or sample.trained[end] != sample.trained[start]:
            text = tokenizer.decode(
                list(sample.tokens[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            is_worse = bool(sample.worse_from) and start >= sample.worse_from
            pieces.append(Piece(text, sample.trained[start], end - start, is_worse))
            start = end
    return SampleView(_place(sample.origin), tuple(pieces))


def problem_at(origin: Origin | None, message: str) -> Problem:
    """A problem of the sample at `origin`."""
    if origin is None:
        return Problem("(no file)", 0, message)
    return Problem(origin.path, origin.line, message, origin.unit)


def _place(origin: Origin | None) -> str:
    return str(origin) if origin else "(no file)"


def _coloured(view: SampleView) -> Text:
    from rich.text import Text

    text = Text()
    was_worse = False
    for piece in view.pieces:
        shown = piece.text
        if len(shown) > _SHOWN_CHARACTERS:
            half = _SHOWN_CHARACTERS // 2
            shown = f"{shown[:half]} ... {len(shown) - 2 * half} characters ... {shown[-half:]}"
        # Control characters would act on the terminal; they are shown as pictures.
        shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in shown)
        if piece.is_worse and not was_worse:
            text.append("\n[the worse answer] ", style="bold")
        was_worse = piece.is_worse
        if piece.is_trained:
            text.append(f"⟦{shown}⟧", style="bold red" if piece.is_worse else "bold green")
        else:
            text.append(shown, style="dim")
    return text
