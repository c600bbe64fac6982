"""The method of `train_speed.py`: find the peer's fastest variant, then let both sides take turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from speed_cases import Case, Variant
from speed_inputs import Inputs
from speed_process import Worker, WorkerFailed, room_bytes

# A variant that is so much slower than the best one so far is not tried any longer: after its first step, in which
# everything is made for the first time, and after each timed one.
GIVEN_UP_AFTER_FIRST = 1.4
GIVEN_UP_AFTER_TIMED = 1.1

UNLIKE_STEPS = 4

Recompute = Literal["none", "layers"]


@dataclass(frozen=True)
class Method:
    """How much is measured.

    Attributes:
        rounds: timed steps of each side, one after the other in turns.
        warm_steps: steps before any is timed.
        trial_steps: timed steps of each of the peer's variants before the fastest is chosen; where steps are small
            and unlike, `UNLIKE_STEPS` times as many.
        is_quick: the variant tried first is timed only beside the next one, and ours warm up on one step less.
    """

    rounds: int
    warm_steps: int
    trial_steps: int
    threads: int
    is_quick: bool = False

    @property
    def own_warm_steps(self) -> int:
        """Those of ours: a step less where it has to be quick."""
        return self.warm_steps + (0 if self.is_quick else 1)

    def trial_steps_of(self, case: Case) -> int:
        return self.trial_steps if case.has_fixed_rows else self.trial_steps * UNLIKE_STEPS


@dataclass(frozen=True)
class Trial:
    """A variant of the peer, tried. Without figures where it was left out; `note` says why, or what cut it short."""

    variant: str
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    load_seconds: float | None = None
    first_step_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the result. Ratios are ours to the peer's; `problem` says why there are no figures.

    Attributes:
        tokens_counted: of both sides' timed steps, without padding.
        tokens_computed, peer_tokens_computed: of the same with padding, shared beginnings once.
        losses, peer_losses: of all steps from the first; comparable one by one only in cases of fixed rows.
    """

    case: str
    compute: str
    recompute: Recompute = "none"
    speed_ratio: float | None = None
    memory_ratio: float | None = None
    tokens_per_second: float | None = None
    peer_tokens_per_second: float | None = None
    peak_bytes: int | None = None
    peer_peak_bytes: int | None = None
    peer_variant: str | None = None
    load_peak_bytes: int | None = None
    peer_load_peak_bytes: int | None = None
    load_seconds: float | None = None
    peer_load_seconds: float | None = None
    warm_up_seconds: float | None = None
    peer_warm_up_seconds: float | None = None
    tokens_counted: int | None = None
    tokens_computed: int | None = None
    peer_tokens_computed: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    peer_step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peer_losses: list[float] = field(default_factory=list)
    largest_loss_difference: float | None = None
    trials: list[Trial] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class PeerSide:
    """The peer as it is compared: its variant, its worker, the steps before the comparison, and what was tried."""

    variant: Variant
    worker: Worker
    warm_steps: int
    trials: list[Trial]


class NoPeer(Exception):  # noqa: N818 - it tells what happened
    """No variant of the peer could run; the message says why."""


def start_peer(inputs: Inputs, variant: Variant, method: Method) -> Worker:
    spec = {
        "side": "peer", "model": str(inputs.model), "steps": str(inputs.steps), "adapter": str(inputs.adapter),
        "variant": asdict(variant), "threads": method.threads,
    }  # fmt: skip
    return Worker(spec, inputs.scratch, method.threads)


def start_ours(
    inputs: Inputs,
    run_file: Path,
    threads: int,
    without: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Worker:
    """`without`: the name of a part that this process does without (`speed_switches`)."""
    spec = {
        "side": "fitune", "run_file": str(run_file), "without": without,
        "steps": str(inputs.steps) if inputs.case.has_fixed_rows else None,
        "adapter": None if inputs.adapter is None else str(inputs.adapter),
    }  # fmt: skip
    return Worker(spec, inputs.scratch, threads, environment)


def needed_bytes(case: Case, variant: Variant) -> float:
    return case.peer_bytes_checkpointed if variant.checkpointing else case.peer_bytes


@dataclass(frozen=True)
class _Best:
    """The fastest variant so far: seconds of its first step, and of its timed ones (None: not timed)."""

    variant: Variant
    first_seconds: float
    seconds: float | None


def fastest_peer(
    inputs: Inputs, variants: Sequence[Variant], method: Method, say: Callable[[str], None]
) -> PeerSide:  # fmt: skip
    """Tries the variants one after the other; the fastest so far stays loaded where there is room for the next.

    Raises NoPeer; and WorkerFailed where the fastest cannot be loaded again.
    """
    case = inputs.case
    best: _Best | None = None
    kept: Worker | None = None
    trials: list[Trial] = []
    try:
        for variant in variants:
            needed = needed_bytes(case, variant)
            if best is not None and kept is not None and room_bytes([kept]) < needed:
                if best.seconds is None:
                    best = replace(best, seconds=kept.step())
                kept.close()
                kept = None
            room = room_bytes([kept] if kept else [])
            if room < needed:
                note = f"left out: needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} are free"
                trials.append(Trial(variant.name, note=note))
                say(f"{case.name}: {variant.name}: {note}")
                continue
            worker = None
            try:
                worker = start_peer(inputs, variant, method)
                trial, faster = _tried(worker, variant, best, kept, method, case)
            except WorkerFailed as error:
                trial, faster = Trial(variant.name, note=f"failed: {error}"), None
            trials.append(trial)
            say(f"{case.name}: {trial_sentence(trial)}")
            if faster is not None:
                if kept is not None:
                    kept.close()
                best, kept = faster, worker
            elif worker is not None:
                worker.close()
        if best is None:
            raise NoPeer("; ".join(f"{trial.variant}: {trial.note}" for trial in trials))
        if kept is None:
            kept = start_peer(inputs, best.variant, method)
            for _ in range(method.warm_steps + method.trial_steps_of(case)):
                kept.step()
    except BaseException:
        if kept is not None:
            kept.close()
        raise
    return PeerSide(best.variant, kept, len(kept.losses), trials)


def _tried(
    worker: Worker, variant: Variant, best: _Best | None, kept: Worker | None, method: Method, case: Case
) -> tuple[Trial, _Best | None]:
    """A loaded variant's trial; and the variant as the new best where it is faster.

    Where the best so far is loaded (`kept`) the two take turns, for machines get slower and faster by the minute.
    """
    for _ in range(method.warm_steps):
        worker.step()
    timed: list[float] = []
    beside: list[float] = []
    # Of steps that are all alike the quickest is taken: a moment's company makes a step slower, never quicker.
    typical = min if case.has_fixed_rows else statistics.fmean
    limit, note = (best.seconds if best else None) or math.inf, ""
    if best is None and method.is_quick and case.has_fixed_rows:
        trial = Trial(
            variant.name, None, worker.memory()[0], worker.load_seconds, worker.seconds[0], "timed beside the next"
        )
        return trial, _Best(variant, worker.seconds[0], None)
    if best is not None and worker.seconds[0] > GIVEN_UP_AFTER_FIRST * best.first_seconds:
        note, timed = "given up after its first step", worker.seconds[-1:]
    while not note and len(timed) < method.trial_steps_of(case):
        if kept is not None:
            beside.append(kept.step(None if case.has_fixed_rows else len(worker.losses) % len(worker.step_tokens)))
            limit = typical(beside)
        timed.append(worker.step())
        if case.has_fixed_rows and typical(timed) > GIVEN_UP_AFTER_TIMED * limit:
            note = f"given up after {len(timed)} timed steps"
    seconds = typical(timed)
    numbers = [number % len(worker.step_tokens) for number in range(len(worker.seconds))]
    rate = sum(worker.step_tokens[number] for number in numbers[-len(timed) :]) / sum(timed)
    trial = Trial(variant.name, rate, worker.memory()[0], worker.load_seconds, worker.seconds[0], note)
    return trial, None if note or seconds >= limit else _Best(variant, worker.seconds[0], seconds)


def trial_sentence(trial: Trial) -> str:
    if trial.tokens_per_second is None or trial.peak_bytes is None:
        return f"{trial.variant}: {trial.note}"
    figures = f"{trial.tokens_per_second:,.0f} tokens/s, {trial.peak_bytes / 1e9:.2f} GB"
    return f"{trial.variant}: {figures}{f' ({trial.note})' if trial.note else ''}"


def turns(ours: int, peers: int) -> Iterator[tuple[bool, int]]:
    """(whether it is ours, number) of the steps 0, 1, ... of two sides that take turns and end together."""
    done = 0
    for number in range(ours):
        yield True, number
        until = round((number + 1) * peers / ours)
        for place in range(done, until):
            yield False, place
        done = max(done, until)


def compare(
    inputs: Inputs, ours: Mapping[str, Worker], peer: PeerSide, method: Method, recompute: Recompute
) -> list[Row]:
    """All sides in turns, from the state that the peer is in; ours warm up on the same first steps.

    `ours`: by their train.compute. One that fails gets a row that says so, and the others go on.
    """
    case = inputs.case
    first = None if case.has_fixed_rows else 0
    sides = {compute: _Side(worker) for compute, worker in ours.items()}
    for side in sides.values():
        for _ in range(method.own_warm_steps):
            side.step(first)
        side.seconds.clear()
        side.check_samples(peer.worker)
    own_steps, peer_steps = method.rounds, method.rounds
    if not case.has_fixed_rows:
        own_steps = max((len(side.worker.step_tokens) for side in sides.values() if not side.problem), default=0)
        peer_steps = len(peer.worker.step_tokens)
    peer_seconds: list[float] = []
    for is_ours, number in turns(own_steps, peer_steps):
        place = None if case.has_fixed_rows else number
        if not is_ours:
            peer_seconds.append(peer.worker.step(place))
            continue
        for side in sides.values():
            side.step(place)
    return [_row(case, compute, side, peer, peer_seconds, method, recompute) for compute, side in sides.items()]


@dataclass
class _Side:
    """One of ours in a comparison: its timed steps, and what went wrong."""

    worker: Worker
    seconds: list[float] = field(default_factory=list)
    problem: str | None = None

    def step(self, number: int | None) -> None:
        if self.problem is None:
            try:
                self.seconds.append(self.worker.step(number))
            except WorkerFailed as error:
                self.problem = problem_of(error)

    def check_samples(self, peer: Worker) -> None:
        if self.problem is None and sum(self.worker.step_tokens) != sum(peer.step_tokens):
            raise RuntimeError("the two sides were given different samples")


def problem_of(error: WorkerFailed) -> str:
    """Why there are no figures of ours."""
    return f"{'fitune refuses it' if error.is_refusal else 'failed'}: {error}"


def _row(
    case: Case, compute: str, side: _Side, peer: PeerSide, peer_seconds: list[float], method: Method,
    recompute: Recompute,
) -> Row:  # fmt: skip
    if side.problem is not None:
        return Row(case.name, compute, recompute, peer_variant=peer.variant.name, problem=side.problem)
    ours, theirs = side.worker, peer.worker
    rate, peer_rate = _rate(case, ours, side.seconds), _rate(case, theirs, peer_seconds)
    peak, peer_peak = ours.memory()[0], theirs.memory()[0]
    pairs = list(zip(ours.losses, theirs.losses, strict=False)) if case.has_fixed_rows else []
    counted, peer_counted = len(side.seconds), len(peer_seconds)
    return Row(
        case=case.name,
        compute=compute,
        recompute=recompute,
        speed_ratio=rate / peer_rate,
        memory_ratio=peak / peer_peak,
        tokens_per_second=rate,
        peer_tokens_per_second=peer_rate,
        peak_bytes=peak,
        peer_peak_bytes=peer_peak,
        peer_variant=peer.variant.name,
        load_peak_bytes=ours.load_peak_bytes,
        peer_load_peak_bytes=theirs.load_peak_bytes,
        load_seconds=ours.load_seconds,
        peer_load_seconds=theirs.load_seconds,
        warm_up_seconds=sum(ours.seconds[: method.own_warm_steps]),
        peer_warm_up_seconds=sum(theirs.seconds[: peer.warm_steps]),
        tokens_counted=sum(ours.step_tokens[:counted]),
        tokens_computed=sum(ours.computed_tokens[:counted]),
        peer_tokens_computed=sum(theirs.computed_tokens[:peer_counted]),
        step_seconds=side.seconds,
        peer_step_seconds=peer_seconds,
        losses=list(ours.losses),
        peer_losses=list(theirs.losses),
        largest_loss_difference=max((abs(one - other) for one, other in pairs), default=None),
        trials=list(peer.trials),
        report=ours.report,
    )


def _rate(case: Case, worker: Worker, seconds: Sequence[float]) -> float:
    """Tokens a second: by the median step where all are alike, else all tokens by all seconds."""
    if case.has_fixed_rows:
        return worker.step_tokens[0] / statistics.median(seconds)
    return sum(worker.step_tokens) / sum(seconds)
