"""A stream of samples in, columns of encoded ones out, in the same order: by this process, or by several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitune.data.conversation import Message, Sample
from fitune.data.encoding import EncodedSample, TrainOn, encoder_for
from fitune.data.length import Fitted, OverLength, fit_or_split
from fitune.data.tally import Tally
from fitune.data.text_checks import text_problems
from fitune.data.token_table import Columns, packed
from fitune.errors import FituneError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What goes from process to process at a time: so many samples, or fewer of so many characters.
CHUNK_SAMPLES, CHUNK_CHARACTERS = 256, 1 << 20
# Chunks that wait for each process: enough to keep it busy, few enough to stay small.
_AHEAD = 3


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """How samples become tokens: `length.fit_or_split`'s arguments."""

    max_tokens: int
    over_length: OverLength
    train_on: TrainOn
    system: str | None


Chunk = tuple[Columns, Tally]


def encode_samples(
    samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings, processes: int = 1
) -> Iterator[Chunk]:
    """Columns of the samples that can be trained on, chunk by chunk, and what was found in each.

    The samples' numbers begin at 0 in every chunk. Never more than a few chunks are in memory.

    Raises FituneError where a process was killed.
    """
    if processes <= 1:
        for chunk in _chunks(samples):
            yield encode_chunk(chunk, tokenizer, settings)
        return
    # As torch's own loaders do; a forked process shares the tokenizer's memory with this one.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[Chunk]] = deque()
    pool = ProcessPoolExecutor(processes, context, _begin, (tokenizer, settings))
    try:
        for chunk in _chunks(samples):
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # Python 3.11's shutdown waits for ever for a thread that writes into a pipe nobody reads (gh-94777).
        reader = getattr(getattr(pool, "_call_queue", None), "_reader", None)
        if reader is not None:
            reader.close()
        raise FituneError(
            f"one of the {processes} processes that tokenise crashed, or was ended from outside, as systems do that "
            "are short of memory; nothing was kept of its file. Free some memory and begin again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    characters = 0
    for sample in samples:
        chunk.append(sample)
        characters += len(sample.text or "") + sum(len(message.content) for message in sample.messages)
        if len(chunk) >= CHUNK_SAMPLES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


_IN_PROCESS: list[tuple[PreTrainedTokenizerBase, EncodingSettings]] = []


def _begin(tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _IN_PROCESS[:] = [(tokenizer, settings)]


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _encode(chunk: list[Sample]) -> Chunk:
    return encode_chunk(chunk, *_IN_PROCESS[0])


def encode_chunk(samples: list[Sample], tokenizer: PreTrainedTokenizerBase, settings: EncodingSettings) -> Chunk:
    """Encodes samples one after the other; one that cannot be is named in the tally's `refused`."""
    encoder = encoder_for(tokenizer)
    tally = Tally()
    kept: list[EncodedSample] = []
    numbers: list[int] = []
    for number, sample in enumerate(samples):
        tally.samples += 1
        try:
            parts = fit_or_split(
                sample, encoder, settings.max_tokens, settings.over_length, settings.train_on, settings.system
            )
        except InputError as error:
            tally.refuse(str(error))
            continue
        _note_text(tally, sample)
        tally.split += len(parts) > 1
        for fitted in parts:
            if _is_kept(tally, sample, fitted):
                assert fitted.encoded is not None
                kept.append(fitted.encoded)
                numbers.append(number)
    return packed(kept, numbers), tally


def _is_kept(tally: Tally, sample: Sample, fitted: Fitted) -> bool:
    """Whether a sample can be trained on; notes why not, and what there is to say of it."""
    line = sample.origin.line if sample.origin else 0
    if fitted.note:
        tally.note(line, fitted.note)
    encoded = fitted.encoded
    if encoded is None:
        tally.dropped += 1
        return False
    tally.cut += encoded.is_cut
    if not encoded.trained_tokens:
        tally.nothing_to_train += 1
        tally.note(line, "no token of it would be trained; left out")
        return False
    if encoded.lost_characters:
        tally.note(line, f"{encoded.lost_characters} characters that the tokenizer's vocabulary lacks are lost")
    if encoded.without_end_token:
        tally.without_end_token += 1
        tally.note(line, "an answer has no trained end-of-turn token")
    if any(message.role == "assistant" and _is_empty(message) for message in sample.messages):
        tally.empty += 1
        tally.note(line, "an answer is empty")
    if encoded.control_tokens_in_text:
        tally.note(
            line, f"its text holds control tokens ({encoded.control_tokens_in_text}), which are encoded as plain text"
        )
    tally.lost_end += encoded.lost_end and sample.text is None
    tally.control_tokens += encoded.control_tokens_in_text
    tally.lost_characters += encoded.lost_characters
    return True


def _is_empty(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _note_text(tally: Tally, sample: Sample) -> None:
    """What looks wrong in a sample's text, each kind once."""
    texts = [sample.text] if sample.text is not None else [message.content for message in sample.messages]
    found: dict[str, str] = {}
    for text in texts:
        for kind, sentence in text_problems(text):
            found.setdefault(kind, sentence)
    tally.suspicious.update(found.keys())
    for sentence in found.values():
        tally.note(sample.origin.line if sample.origin else 0, sentence)
