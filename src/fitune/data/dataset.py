"""The run file's `data` section in, encoded training and validation samples and a report out; fails closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fitune.data.conversation import Message, Origin, Sample
from fitune.data.encoding import EncodedSample, Encoder, TrainOn, encoder_for
from fitune.data.formats import FORMATS, TRAINABLE
from fitune.data.hub_files import fetch, is_on_hub
from fitune.data.length import Fitted, OverLength, fit_or_split
from fitune.data.mixing import repeated, set_weights
from fitune.data.reading import read_with_format
from fitune.data.record import SHOWN_PROBLEMS
from fitune.data.report import (
    SHOWN_SAMPLES,
    DataReport,
    Problem,
    SourceFile,
    length_histogram,
    problem_at,
    view_of,
)
from fitune.data.split import content_key, split_share
from fitune.data.text_checks import text_problems
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


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        train: the samples of one epoch, weights applied (a sample of weight 2 is there twice), in file order.
        validation: those held out; empty if the run asks for none.
        report: what was read and what was done to it.
    """

    train: list[EncodedSample]
    validation: list[EncodedSample]
    report: DataReport


@dataclass(slots=True)
class _Tally:
    """What was found while encoding."""

    kept: list[EncodedSample] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    samples: int = 0
    lost_end: int = 0
    split: int = 0
    cut: int = 0
    dropped: int = 0
    empty: int = 0
    nothing_to_train: int = 0
    without_end_token: int = 0
    suspicious: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Examined:
    """Data as far as they could be read, and why they cannot be trained on; empty: they can."""

    data: TrainingData
    refusals: tuple[InputError, ...]


def load_training_data(data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> TrainingData:
    """Reads every file, encodes every sample, applies the length policy and splits off the validation set.

    The same files, settings, tokenizer and seed give the same samples in the same order.

    Raises:
        InputError: a file or sample cannot be used (all of them are named, up to a limit and then counted);
            nothing is left to train on; more than `NOTHING_TO_TRAIN_SHARE` of the samples have no trained
            token; a trained answer has no end-of-turn token; or the validation set is the training set.
    """
    examined = examine_data(data, tokenizer, seed)
    if examined.refusals:
        raise examined.refusals[0]
    return examined.data


def examine_data(data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Examined:
    """As `load_training_data`, with what would be refused beside what was found.

    Raises:
        InputError: a file cannot be read, or settings contradict each other.
    """
    encoder = encoder_for(tokenizer)
    validation_path = data.validation if isinstance(data.validation, str) else None
    sources = _sources(data)
    _refuse_same_file(sources, validation_path)
    read, files = _read(sources, validation_path)
    _refuse_template(encoder, files, data)
    refusals = [_untrainable_format(file) for file in files if FORMATS[file.format].objective]
    tally = _encode_all(read[: len(sources)], encoder, data)
    refusals += _refused(tally, data)
    keys = [content_key(sample) for sample in tally.kept]
    duplicates = _note_duplicates(tally, keys)
    kept, leaked = tally.kept, 0
    held_out: list[EncodedSample] = []
    chosen = list(range(len(kept)))
    if validation_path is not None:
        checked = _encode_all(read[len(sources) :], encoder, data)
        refusals += _refused(checked, data, "validation")
        held_out = checked.kept
        leaked = _note_leaks(held_out, set(keys), tally.problems, validation_path, refusals)
        tally.problems += checked.problems
        tally.suspicious += checked.suspicious
    elif isinstance(data.validation, float) and not refusals:
        chosen, places = split_share(_of_documents(kept, keys), data.validation, seed)
        held_out = [kept[place] for place in places]
    train: list[EncodedSample] = []
    try:
        weights = _weights(sources, [tally.sources[place] for place in chosen], data.mix_temperature)
        train = list(repeated([kept[place] for place in chosen], weights, seed))
    except InputError as error:
        refusals.append(error)
    if not train and not refusals:
        refusals.append(InputError("data.train: the weights leave no sample; raise one of them"))
    report = DataReport(
        files=tuple(files),
        samples=tally.samples,
        tokens=sum(map(len, kept)),
        trained_tokens=sum(sample.trained_tokens for sample in kept),
        train_samples=len(train),
        validation_samples=len(held_out),
        cut=tally.cut,
        dropped=tally.dropped,
        split=tally.split,
        empty=tally.empty,
        duplicates=duplicates,
        leaked=leaked,
        without_end_token=tally.without_end_token,
        end_token_share=1 - (tally.without_end_token + tally.lost_end) / max(1, len(kept)),
        nothing_to_train=tally.nothing_to_train,
        control_tokens_in_text=sum(sample.control_tokens_in_text for sample in kept),
        lost_characters=sum(sample.lost_characters for sample in kept),
        row_tokens=data.max_tokens,
        longest_tokens=max(map(len, kept), default=0),
        lengths=length_histogram([len(sample) for sample in kept]),
        has_default_template=encoder.template.is_default,
        mojibake=tally.suspicious["mojibake"],
        control_characters=tally.suspicious["control_characters"],
        mixed_scripts=tally.suspicious["mixed_scripts"],
        refused=tuple(str(refusal) for refusal in refusals),
        problems=tuple(tally.problems),
        views=tuple(view_of(sample, tokenizer) for sample in kept[:SHOWN_SAMPLES]),
    )
    return Examined(TrainingData(train, held_out, report), tuple(refusals))


def read_training_samples(data: DataSettings) -> tuple[list[Sample], list[Sample]]:
    """The samples of all training files, before any is held out, and those of the validation file, if it is one.

    Raises:
        InputError: a file cannot be read.
    """
    sources = _sources(data)
    read, _ = _read(sources, data.validation if isinstance(data.validation, str) else None)
    return [sample for group in read[: len(sources)] for sample in group], [
        sample for group in read[len(sources) :] for sample in group
    ]


def _sources(data: DataSettings) -> list[SourceSettings]:
    replay = [_Replay(data.replay, share=data.replay_share)] if data.replay else []
    return [*data.train, *replay]


def _of_documents(samples: Sequence[EncodedSample], keys: Sequence[bytes]) -> list[bytes]:
    """The keys, but of all parts of a document the first one's: they stay together."""
    first: dict[Origin, bytes] = {}
    return [
        first.setdefault(sample.origin, key) if sample.origin else key
        for sample, key in zip(samples, keys, strict=True)
    ]


def _untrainable_format(file: SourceFile) -> InputError:
    kind = FORMATS[file.format].objective
    return InputError(
        f"these are {kind}, which this version cannot train; trained are {', '.join(TRAINABLE)}", where=file.path
    )


def _refuse_template(encoder: Encoder, files: Sequence[SourceFile], data: DataSettings) -> None:
    """A chat needs the template that the model will be asked with; an instruction file may do with the default."""
    if data.chat_template == "instruction" and not encoder.template.is_default:
        raise InputError(
            "data.chat_template: instruction is for models without a chat template; this one has its own"
        )
    chats = [str(file.path) for file in files if file.format in CHAT_FORMATS]
    if data.chat_template == "model" and encoder.template.is_default and chats:
        raise InputError(
            f"{', '.join(chats)}: a chat ({'/'.join(CHAT_FORMATS)}), and the model has no chat template; put the "
            "template it shall be asked with into its folder as chat_template.jinja, or set data.chat_template: "
            "instruction to have turns written with ### Instruction: and ### Response:"
        )


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


class _Wanted(NamedTuple):
    """A file, and how it is read."""

    path: str
    format: str
    columns: Mapping[str, str]
    instruction: str


def _read(sources: Sequence[SourceSettings], validation: str | None) -> tuple[list[list[Sample]], list[SourceFile]]:
    wanted = [_Wanted(source.path, source.format, source.columns, source.instruction or "") for source in sources]
    if validation is not None:
        # A validation file is written like the training files; only its columns may need the same names.
        own = [source for source in sources if not isinstance(source, _Replay)]
        alike = len({(s.format, tuple(s.columns.items()), s.instruction) for s in own}) == 1
        wanted.append(wanted[0]._replace(path=validation) if alike else _Wanted(validation, "auto", {}, ""))
    read: list[list[Sample]] = []
    files: list[SourceFile] = []
    errors: list[InputError] = []
    for source in wanted:
        samples: list[Sample] = []
        read.append(samples)
        try:
            for file in fetch(source.path) if is_on_hub(source.path) else [source.path]:
                found, name = read_with_format(file, source.format, source.columns, source.instruction)
                samples += found
                files.append(SourceFile(str(file), name, len(found)))
        except InputError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError([f"{error.where}: {problem}" for error in errors for problem in error.problems])
    return read, files


@dataclass(frozen=True, slots=True)
class _Replay:
    """The set of general samples that is mixed in against forgetting, as a source."""

    path: str
    share: float | None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    weight: float = 1.0


def _weights(sources: Sequence[SourceSettings], found: Sequence[int], temperature: float) -> list[float]:
    """How often each sample is seen in an epoch; `found`: which source each is of."""
    counts = Counter(found)
    of_set = set_weights(
        [counts[number] for number in range(len(sources))],
        [source.weight for source in sources],
        [source.share for source in sources],
        temperature,
    )
    return [of_set[number] for number in found]


def _encode_all(groups: Sequence[Sequence[Sample]], encoder: Encoder, data: DataSettings) -> _Tally:
    tally = _Tally()
    for number, samples in enumerate(groups):
        for sample in samples:
            tally.samples += 1
            try:
                parts = fit_or_split(sample, encoder, data.max_tokens, data.over_length, data.train_on, data.system)
            except InputError as error:
                tally.refused.append(str(error))
                continue
            _note_text(tally, sample)
            tally.split += len(parts) > 1
            for fitted in parts:
                _keep(tally, sample, fitted, number)
    return tally


def _keep(tally: _Tally, sample: Sample, fitted: Fitted, source: int) -> None:
    """Takes a sample, or says why not, and what there is to say of it."""
    if fitted.note:
        tally.problems.append(problem_at(sample.origin, fitted.note))
    encoded = fitted.encoded
    if encoded is None:
        tally.dropped += 1
        return
    tally.cut += encoded.is_cut
    if not encoded.trained_tokens:
        tally.nothing_to_train += 1
        tally.problems.append(problem_at(sample.origin, "no token of it would be trained; left out"))
        return
    if encoded.lost_characters:
        lost = f"{encoded.lost_characters} characters that the tokenizer's vocabulary lacks are lost"
        tally.problems.append(problem_at(sample.origin, lost))
    if encoded.without_end_token:
        tally.without_end_token += 1
        tally.problems.append(problem_at(sample.origin, "an answer has no trained end-of-turn token"))
    if any(message.role == "assistant" and _is_empty(message) for message in sample.messages):
        tally.empty += 1
        tally.problems.append(problem_at(sample.origin, "an answer is empty"))
    tally.lost_end += encoded.lost_end and sample.text is None
    tally.kept.append(encoded)
    tally.sources.append(source)


def _is_empty(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _note_text(tally: _Tally, sample: Sample) -> None:
    """What looks wrong in a sample's text, each kind once."""
    texts = [sample.text] if sample.text is not None else [message.content for message in sample.messages]
    found: dict[str, str] = {}
    for text in texts:
        for kind, sentence in text_problems(text):
            found.setdefault(kind, sentence)
    tally.suspicious.update(found.keys())
    tally.problems += [problem_at(sample.origin, sentence) for sentence in found.values()]


def _refused(tally: _Tally, data: DataSettings, name: str = "train") -> list[InputError]:
    """Why these samples cannot be trained on."""
    where = f"data.{name}"
    if tally.refused:
        more = len(tally.refused) - SHOWN_PROBLEMS
        listed = [*tally.refused[:SHOWN_PROBLEMS], *([f"and {more} more samples"] if more > 0 else [])]
        return [InputError(listed, where="data")]
    if tally.nothing_to_train > NOTHING_TO_TRAIN_SHARE * tally.samples or not tally.kept:
        listed = [str(problem) for problem in tally.problems[:SHOWN_PROBLEMS]]
        error = InputError(
            [
                f"{tally.nothing_to_train} of {tally.samples} samples have no token to train and {tally.dropped} "
                f"were dropped for their length; {len(tally.kept)} are left "
                f"(at most {NOTHING_TO_TRAIN_SHARE:.0%} may have nothing to train): "
                "check `train_on`, `weight` and the roles of the turns, and `max_tokens`",
                *listed,
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


def _note_duplicates(tally: _Tally, keys: Sequence[bytes]) -> int:
    first: dict[bytes, EncodedSample] = {}
    count = 0
    for sample, key in zip(tally.kept, keys, strict=True):
        if key in first:
            count += 1
            tally.problems.append(problem_at(sample.origin, f"the same sample as {first[key].origin}"))
        else:
            first[key] = sample
    return count


def _note_leaks(
    held_out: Sequence[EncodedSample], train: set[bytes], problems: list[Problem], path: str,
    refusals: list[InputError],
) -> int:  # fmt: skip
    leaked = [sample for sample in held_out if content_key(sample) in train]
    if held_out and len(leaked) == len(held_out):
        error = InputError(
            "every validation sample is also a training sample, so validation would measure memory only; "
            "hold out a share of the training data instead, such as 0.05",
            where=path,
        )
        refusals.append(error)
    problems += [problem_at(sample.origin, "a validation sample that is also trained on") for sample in leaked]
    return len(leaked)
