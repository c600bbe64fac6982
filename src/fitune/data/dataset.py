"""The run file's `data` section in, encoded training and validation samples and a report out; fails closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fitune.data import encoded_file
from fitune.data.conversation import Sample
from fitune.data.encoded_file import EncodedFile, Wanted, Watch, bytes_of, check_file, encode_file
from fitune.data.encoding import Encoder, TrainOn, encoder_for
from fitune.data.encoding_pool import EncodingSettings
from fitune.data.formats import FORMATS
from fitune.data.hub_files import fetch, is_on_hub
from fitune.data.length import OverLength
from fitune.data.mixing import repeated, set_weights
from fitune.data.record import SHOWN_PROBLEMS
from fitune.data.report import SHOWN_SAMPLES, DataReport, Problem, SourceFile, length_histogram, problem_at, view_of
from fitune.data.sources import kind_of
from fitune.data.split import groups_of, of_documents, split_share
from fitune.data.tally import KEPT_NOTES, Tally
from fitune.data.token_table import Samples
from fitune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More samples than this share without a single trained token mean that the data is not what it is taken for.
NOTHING_TO_TRAIN_SHARE = 0.01
# Formats of whole conversations; the others are instructions, which any wording may ask.
CHAT_FORMATS = ("messages", "sharegpt")


class SourceSettings(Protocol):
    """One entry of `data.train`."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def instruction(self) -> str | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def share(self) -> float | None: ...


class DataSettings(Protocol):
    """The run file's `data` section."""

    @property
    def train(self) -> Sequence[SourceSettings]: ...
    @property
    def validation(self) -> str | float | None: ...
    @property
    def replay(self) -> str | None: ...
    @property
    def replay_share(self) -> float: ...
    @property
    def mix_temperature(self) -> float: ...
    @property
    def system(self) -> str | None: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def train_on(self) -> TrainOn: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def over_length(self) -> OverLength: ...
    @property
    def missing_end_tokens(self) -> str: ...


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        train: the samples of one epoch, weights applied (a sample of weight 2 is there twice), in file order.
        validation: those held out; empty if the run asks for none.
        report: what was read and what was done to it.
        files: how each file was read, in the order of the samples' tables.
    """

    train: Samples
    validation: Samples
    report: DataReport
    files: tuple[Wanted, ...] = ()


@dataclass(frozen=True, slots=True)
class Examined:
    """Data as far as they could be read, and why they cannot be trained on; empty: they can."""

    data: TrainingData
    refusals: tuple[InputError, ...]


def load_training_data(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int = 0, watch: Watch | None = None,
    objective: str | None = "supervised",
) -> TrainingData:  # fmt: skip
    """Reads every file, encodes every sample, applies the length policy and splits off the validation set.

    The same files, settings, tokenizer and seed give the same samples in the same order. `watch` hears how far it is.
    `objective`: the run file's `train.objective`; None: any that learns from all the files.

    Raises:
        InputError: a file or sample cannot be used (all of them are named, up to a limit and then counted); a
            file is not what the objective learns from; nothing is left to train on; more than
            `NOTHING_TO_TRAIN_SHARE` of the samples have no trained token; a trained answer has no end-of-turn
            token; or the validation set is the training set.
    """
    examined = examine_data(data, tokenizer, seed, watch, objective)
    if examined.refusals:
        raise examined.refusals[0]
    return examined.data


def examine_data(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int = 0, watch: Watch | None = None,
    objective: str | None = "supervised",
) -> Examined:  # fmt: skip
    """As `load_training_data`, with what would be refused beside what was found.

    Raises:
        InputError: a file cannot be read, or settings contradict each other.
    """
    encoder = encoder_for(tokenizer)
    validation_path = data.validation if isinstance(data.validation, str) else None
    sources = _sources(data)
    _refuse_same_file(sources, validation_path)
    wanted = _wanted(sources, validation_path)
    _refuse_template(encoder, wanted, data)
    how = EncodingSettings(data.max_tokens, data.over_length, data.train_on, data.system)
    read = _encode(wanted, tokenizer, how, watch)
    of_source = np.array([number for number, _ in read], dtype=np.int64)
    tables = [file.table for _, file in read]
    everything = Samples(tables)
    count = sum(len(file.table) for number, file in read if number < len(sources))
    kept, held_out = everything[:count], everything[count:]
    tally, checked = Tally(), Tally()
    for number, file in read:
        (tally if number < len(sources) else checked).add(file.tally)
    refusals = list(_untrainable([file for _, file in read], objective))
    problems = _problems([file for number, file in read if number < len(sources)])
    refusals += _refused(tally, kept, problems, data)
    groups, first = groups_of(everything.keys())
    repeats = np.flatnonzero(first[groups[:count]] != np.arange(count))
    labels = kept.labels()
    for place in repeats[:KEPT_NOTES].tolist():
        earlier = int(first[groups[place]])
        what = "sample as" if labels[place] == labels[earlier] else "answer, labelled otherwise, as"
        problems.append(problem_at(kept.origin(place), f"the same {what} {kept.origin(earlier)}"))
    leaked = np.zeros(0, dtype=np.int64)
    own: list[Problem] = []
    train = kept
    if validation_path is not None:
        own = _problems([file for number, file in read if number >= len(sources)])
        refusals += _refused(checked, held_out, own, data, "validation")
        leaked = np.flatnonzero(first[groups[len(kept) :]] < len(kept))
        if len(leaked) and len(leaked) == len(held_out):
            refusals.append(_all_leaked(validation_path))
    elif isinstance(data.validation, float) and not refusals:
        documents = of_documents(groups, kept.table_of(), kept.numbers())
        chosen, places = split_share(documents, data.validation, seed)
        train, held_out = kept.take(chosen), kept.take(places)
        # Parts of several texts may be equal where their first ones, which decide, are not.
        leaked = np.flatnonzero(np.isin(groups[places], groups[chosen])) if tally.split else leaked
    told = "a validation sample that is also trained on"
    problems += [problem_at(held_out.origin(place), told) for place in leaked[:KEPT_NOTES].tolist()]
    problems += own
    del groups, first
    try:
        sets = of_source[train.table_of()]
        train = train.take(repeated(sets, _weights(sources, sets, data.mix_temperature), seed))
    except InputError as error:
        refusals.append(error)
        train = train[:0]
    if not len(train) and not refusals:
        refusals.append(InputError("data.train: the weights leave no sample; raise one of them"))
    more = sum(max(0, count - KEPT_NOTES) for count in (len(repeats), len(leaked)))
    more += max(0, len(problems) - KEPT_NOTES)
    suspicious = tally.suspicious + checked.suspicious
    seen = np.bincount(train.table_of(), minlength=len(tables))
    report = DataReport(
        files=tuple(
            SourceFile(file.wanted.path, file.format, file.tally.samples, int(seen[place]), number >= len(sources))
            for place, (number, file) in enumerate(read)
        ),
        samples=tally.samples,
        tokens=int(kept.lengths.sum(dtype=np.int64)),
        trained_tokens=kept.trained_tokens(),
        train_samples=len(train),
        validation_samples=len(held_out),
        cut=tally.cut,
        dropped=tally.dropped,
        split=tally.split,
        empty=tally.empty,
        duplicates=len(repeats),
        leaked=len(leaked),
        without_end_token=tally.without_end_token,
        end_token_share=1 - (tally.without_end_token + tally.lost_end) / max(1, len(kept)),
        nothing_to_train=tally.nothing_to_train,
        control_tokens_in_text=tally.control_tokens,
        lost_characters=tally.lost_characters,
        row_tokens=data.max_tokens,
        longest_tokens=int(kept.lengths.max(initial=0)),
        lengths=length_histogram(kept.lengths),
        has_default_template=encoder.template.is_default,
        mojibake=suspicious["mojibake"],
        control_characters=suspicious["control_characters"],
        mixed_scripts=suspicious["mixed_scripts"],
        refused=tuple(str(refusal) for refusal in refusals),
        problems=tuple(problems[:KEPT_NOTES]),
        more_problems=more + sum(file.tally.more_notes for _, file in read),
        views=tuple(view_of(kept[place], tokenizer) for place in range(min(SHOWN_SAMPLES, len(kept)))),
        kept_in=tuple(str(file.folder) for _, file in read if file.folder is not None),
    )
    return Examined(TrainingData(train, held_out, report, tuple(file.wanted for _, file in read)), tuple(refusals))


def original_samples(data: TrainingData, encoded: Samples) -> Iterator[Sample]:
    """The samples as they stand in the files, of encoded ones: each once, in file order."""
    table_of, numbers = encoded.table_of(), encoded.numbers()
    for place, wanted in enumerate(data.files):
        same = [other for other, found in enumerate(data.files) if found == wanted]  # a file may be given twice
        of_file = set(numbers[np.isin(table_of, same)].tolist())
        if of_file and place == same[0]:
            yield from (sample for number, sample in enumerate(wanted.reader()) if number in of_file)


def read_validation_file(data: DataSettings) -> list[Sample]:
    """The samples of `data.validation`, where it is a file.

    Raises:
        InputError: it cannot be read.
    """
    assert isinstance(data.validation, str)
    samples: list[Sample] = []
    for wanted in _wanted([], data.validation, like=_sources(data))[0]:
        reader = wanted.reader()
        samples += reader
        reader.problems.raise_if_any()
    return samples


def _sources(data: DataSettings) -> list[SourceSettings]:
    replay = [_Replay(data.replay, share=data.replay_share)] if data.replay else []
    return [*data.train, *replay]


def _untrainable(files: Sequence[EncodedFile], objective: str | None) -> Iterator[InputError]:
    """Why the objective cannot learn from files of their formats."""
    wanted = FORMATS[files[0].format].trained_by if objective is None and files else (objective,)
    for file in files:
        known = FORMATS[file.format]
        if set(known.trained_by) & set(wanted):
            continue
        what = f"these are {known.objective or f'samples of the format {known.name}'}"
        if objective is None:
            sentence = f"{what}, and {files[0].wanted.path} holds others; a run learns from one kind"
        else:
            named = " or ".join(known.trained_by)
            sentence = f"{what}, which train.objective {objective} cannot learn from; set it to {named}"
        yield InputError(sentence, where=file.wanted.path)


def _refuse_template(encoder: Encoder, wanted: Sequence[Sequence[Wanted]], data: DataSettings) -> None:
    """A chat needs the template that the model will be asked with; an instruction file may do with the default."""
    if data.chat_template == "instruction" and not encoder.template.is_default:
        raise InputError(
            "data.chat_template: instruction is for models without a chat template; this one has its own"
        )
    if data.chat_template != "model" or not encoder.template.is_default:
        return
    chats = [file.path for files in wanted for file in files if _first_format(file) in CHAT_FORMATS]
    if chats:
        raise InputError(
            f"{', '.join(chats)}: a chat ({'/'.join(CHAT_FORMATS)}), and the model has no chat template; put the "
            "template it shall be asked with into its folder as chat_template.jinja, or set data.chat_template: "
            "instruction to have turns written with ### Instruction: and ### Response:"
        )


def _first_format(wanted: Wanted) -> str:
    """The format of the file's first sound sample; what is wrong with the file is said when it is read."""
    try:
        reader = wanted.reader()
        next(iter(reader), None)
    except InputError:
        return "auto"
    return reader.format


def _refuse_same_file(sources: Sequence[SourceSettings], validation: str | None) -> None:
    if validation is None:
        return
    for number, source in enumerate(sources):
        if Path(source.path).resolve() == Path(validation).resolve():
            name = "data.replay" if isinstance(source, _Replay) else f"data.train[{number}]"
            raise InputError(
                f"data.validation is the same file as {name}; hold out a share of it instead, such as 0.05",
                where=validation,
            )


def _wanted(
    sources: Sequence[SourceSettings], validation: str | None, like: Sequence[SourceSettings] | None = None
) -> list[list[Wanted]]:
    """The files of each source, and last those of `validation`, which is read as the sources (or `like`) are.

    Raises:
        InputError: a name on the hub cannot be fetched.
    """
    found = [Wanted(s.path, s.format, s.columns, s.instruction or "") for s in sources]
    if validation is not None:
        # A validation file is written like the training files; only its columns may need the same names.
        own = [s for s in (sources if like is None else like) if not isinstance(s, _Replay)]
        alike = len({(s.format, tuple(s.columns.items()), s.instruction) for s in own}) == 1
        found.append(
            Wanted(validation, own[0].format, own[0].columns, own[0].instruction or "")
            if alike
            else Wanted(validation)
        )
    return [
        [replace(source, path=str(file)) for file in fetch(source.path)] if is_on_hub(source.path) else [source]
        for source in found
    ]


def _encode(
    wanted: Sequence[Sequence[Wanted]], tokenizer: PreTrainedTokenizerBase, how: EncodingSettings, watch: Watch | None
) -> list[tuple[int, EncodedFile]]:
    """Every file, with the number of its source; raises InputError for all that cannot be read, together."""
    read: list[tuple[int, EncodedFile]] = []
    errors: list[InputError] = []
    there: set[str] = set()
    for file in (file for files in wanted for file in files):
        try:  # before any of them, which may be large, is read
            kind_of(Path(file.path))
            there.add(file.path)
        except InputError as error:
            errors.append(error)
    # Many small files may be more than memory holds, too.
    is_much = (
        sum(bytes_of(Path(file.path)) for files in wanted for file in files if file.path in there)
        >= encoded_file.KEPT_FROM_BYTES
    )
    for number, files in enumerate(wanted):
        for file in files:
            try:
                if file.path not in there:
                    continue
                if errors:  # nothing will come of it: what else is wrong is all there is to find
                    check_file(file)
                else:
                    read.append((number, encode_file(file, tokenizer, how, watch, is_much)))
            except InputError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError([f"{error.where}: {problem}" for error in errors for problem in error.problems])
    return read


@dataclass(frozen=True, slots=True)
class _Replay:
    """The set of general samples that is mixed in against forgetting, as a source."""

    path: str
    share: float | None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    weight: float = 1.0


def _weights(sources: Sequence[SourceSettings], sets: NDArray[np.int64], temperature: float) -> list[float]:
    """How often the samples of each source are seen in an epoch; `sets`: which source each sample is of."""
    counts = np.bincount(sets, minlength=len(sources))
    return set_weights(
        counts.tolist(), [source.weight for source in sources], [source.share for source in sources], temperature
    )


def _problems(files: Sequence[EncodedFile]) -> list[Problem]:
    return [Problem(file.wanted.path, line, words, file.unit) for file in files for line, words in file.tally.notes]


def _refused(
    tally: Tally, kept: Samples, problems: Sequence[Problem], data: DataSettings, name: str = "train"
) -> list[InputError]:
    """Why these samples cannot be trained on."""
    where = f"data.{name}"
    if tally.refused:
        more = tally.more_refused
        return [InputError([*tally.refused, *([f"and {more} more samples"] if more else [])], where="data")]
    if tally.nothing_to_train > NOTHING_TO_TRAIN_SHARE * tally.samples or not len(kept):
        error = InputError(
            [
                f"{tally.nothing_to_train} of {tally.samples} samples have no token to train and {tally.dropped} "
                f"were dropped for their length; {len(kept)} are left "
                f"(at most {NOTHING_TO_TRAIN_SHARE:.0%} may have nothing to train): "
                "check `train_on`, `weight` and the roles of the turns, and `max_tokens`",
                *map(str, problems[:SHOWN_PROBLEMS]),
            ],
            where=where,
        )
        return [error]
    if tally.without_end_token and data.missing_end_tokens == "error":
        error = InputError(
            f"in {tally.without_end_token} of {tally.samples} samples a trained answer has no end-of-turn token, "
            "so the model would not learn to stop: the chat template writes no control token after the answer "
            "in every turn; use another template, take data.train_on: last_assistant where only earlier turns lack "
            "it, or allow it with data.missing_end_tokens: allow",
            where=where,
        )
        return [error]
    return []


def _all_leaked(path: str) -> InputError:
    return InputError(
        "every validation sample is also a training sample, so validation would measure memory only; "
        "hold out a share of the training data instead, such as 0.05",
        where=path,
    )
