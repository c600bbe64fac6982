"""What a run can give up to take less memory, and what that costs in time: its variants, the quickest first.

None changes what is learnt but the method (16 or 4 bits of the frozen weights) and 8-bit optimizer states: a step has
the same rows, however they are split, computed again or brought from the disk. What the run file sets stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fitune.config.schema import RunConfig
from fitune.step.fresh_states import ELEMENT_WISE

# Time of a token against 4,096 and more of them at once (docs/results.md, "What a step costs").
_TOKEN_TIMES = ((256, 1.7), (512, 1.4), (1024, 1.09), (2048, 1.05), (4096, 1.0))
# Of a step, against the step without: rough, to sort by (docs/results.md: "What each part is worth" and others).
RECOMPUTING, STREAMING, EIGHT_BITS, DENSE = 1.2, 1.15, 1.01, 0.97
STATES_ON_DISK = 1.5  # with room for most of them in the page cache; a slow disk takes more

METHODS = ("lora", "qlora")  # what method auto chooses from
# The settings that may be chosen, beside the method.
CHOSEN = (
    "train.micro_batch", "train.accumulation", "train.recompute", "train.optimizer", "train.optimizer_states",
    "train.resident_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen, and why in one sentence."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Variant:
    """A run as it could be.

    Attributes:
        choices: what of it was chosen.
        streams: whether some layers' frozen weights may come from the disk; how many is a matter of the budget.
        relative_time: of a step, against the quickest variant there could be; an estimate, to sort by.
    """

    run: RunConfig
    choices: tuple[Choice, ...]
    streams: bool
    relative_time: float


def given_settings(run: RunConfig) -> frozenset[str]:
    """The names of the settings that the run file sets, `train.micro_batch` and so on; an `auto` sets nothing."""
    names = set(run.model_fields_set) if run.method != "auto" else set(run.model_fields_set) - {"method"}
    names |= {f"train.{name}" for name in run.train.model_fields_set}
    return frozenset(names)


def variants(run: RunConfig, row_tokens: int) -> list[Variant]:
    """All variants of a run whose rows hold so many tokens, the quickest first; of equals the least changed."""
    given = given_settings(run)
    found = [
        _variant(run, row_tokens, method, parts, recompute, optimizer, states, streams)
        for method in ([run.method] if run.method != "auto" else METHODS)
        for parts in _splits(run, given)
        for recompute in _either(run.train.recompute, ("none", "layers"), "train.recompute" in given)
        for optimizer in _optimizers(run, method, given)
        for states in _states(run, method, given)
        for streams in ((False, True) if method == "qlora" and "train.resident_layers" not in given else (False,))
    ]
    return sorted(found, key=lambda variant: (variant.relative_time, len(variant.choices)))


def _either(value: str, all_values: tuple[str, ...], is_given: bool) -> tuple[str, ...]:
    return (value,) if is_given else all_values


def _splits(run: RunConfig, given: frozenset[str]) -> Iterator[int]:
    """Into how many parts each micro-batch can be cut."""
    rows = run.train.micro_batch
    return (parts for parts in range(1, rows + 1) if rows % parts == 0 and (parts == 1 or _may_split(given)))


def _may_split(given: frozenset[str]) -> bool:
    return "train.micro_batch" not in given


def _trains_whole(run: RunConfig, method: str) -> bool:
    """Whether weights of the base learn themselves."""
    return method == "full" or bool(run.lora.modules_to_save)


def _optimizers(run: RunConfig, method: str, given: frozenset[str]) -> tuple[str, ...]:
    """An adapter's states are small: 8 bits are for whole weights."""
    is_fixed = not _trains_whole(run, method) or "train.optimizer" in given
    return _either(run.train.optimizer, ("adamw", "adamw8bit"), is_fixed)


def _states(run: RunConfig, method: str, given: frozenset[str]) -> tuple[str, ...]:
    is_fixed = (
        not _trains_whole(run, method) or "train.optimizer_states" in given or run.train.optimizer not in ELEMENT_WISE
    )
    return _either(run.train.optimizer_states, ("memory", "disk"), is_fixed)


def _variant(
    run: RunConfig, row_tokens: int, method: str, parts: int, recompute: str, optimizer: str, states: str,
    streams: bool,
) -> Variant:  # fmt: skip
    train, choices = run.train, []
    micro_batch, accumulation = train.micro_batch // parts, train.accumulation * parts
    if run.method == "auto":
        bits = "16 bits: its base fits as it is" if method == "lora" else "4 bits: in 16 it would not fit"
        choices.append(Choice("method", method, f"an adapter on a base of {bits}"))
    if parts > 1:
        choices.append(Choice("train.micro_batch", micro_batch, f"fewer rows at once, {parts} times as often"))
        choices.append(Choice("train.accumulation", accumulation, "so that a step has as many rows as before"))
    if recompute != train.recompute:
        choices.append(Choice("train.recompute", recompute, "each layer is computed again: a fifth more time"))
    if optimizer != train.optimizer:
        choices.append(Choice("train.optimizer", optimizer, "its states in 8 bits: a quarter of their memory"))
    if states != train.optimizer_states:
        choices.append(Choice("train.optimizer_states", states, "with the gradients in a file: the disk is slower"))
    changed = train.model_copy(
        update={
            name.removeprefix("train."): choice.value
            for choice in choices
            if (name := choice.setting).startswith("train.")
        }
    )
    time = _token_time(micro_batch * row_tokens)
    for is_taken, factor in (
        (method == "lora", DENSE), (recompute == "layers", RECOMPUTING), (optimizer == "adamw8bit", EIGHT_BITS),
        (states == "disk", STATES_ON_DISK), (streams, STREAMING),
    ):  # fmt: skip
        time *= factor if is_taken else 1.0
    return Variant(
        run.model_copy(update={"method": method, "train": changed}), tuple(choices), streams, time
    )  # fmt: skip


def _token_time(tokens: int) -> float:
    """Between the measured ones in proportion to the logarithm's steps; outside as at the ends."""
    if tokens <= _TOKEN_TIMES[0][0]:
        return _TOKEN_TIMES[0][1] * _TOKEN_TIMES[0][0] / max(tokens, 1)
    for (few, slow), (many, quick) in itertools.pairwise(_TOKEN_TIMES):
        if tokens <= many:
            return slow + (quick - slow) * (tokens - few) / (many - few)
    return _TOKEN_TIMES[-1][1]
