"""The nearest run that fits where a run does not: a few settings changed, the cheapest first.

In this order: layers computed again in the backward pass (a third more time), one row at a time with the same rows a
step (slower products), the optimizer's states in 8 bits, weights frozen and then in 4 bits (another method), shorter
rows (other data). What turns out not to be needed in the end is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.plan.elsewhere import peak_on
from fitune.plan.machines import Machine
from fitune.plan.planner import Workload

SHORTEST_ROW_TOKENS = 256


@dataclass(frozen=True)
class NearestFit:
    """What to change.

    Attributes:
        settings: as they are written after `fitune plan MODEL`.
        peak_bytes: with all of them.
        missing_bytes: what is missing even so; 0: it fits.
    """

    settings: tuple[str, ...]
    peak_bytes: int
    missing_bytes: int


@dataclass(frozen=True)
class _State:
    run: RunConfig
    workload: Workload

    def train(self, **values: Any) -> _State:
        """With these fields of `train`."""
        run = self.run.model_copy(update={"train": self.run.train.model_copy(update=values)})
        return replace(self, run=run)


@dataclass(frozen=True)
class _Change:
    """`settings`: as written; `apply`: the same to a state."""

    settings: tuple[str, ...]
    apply: Callable[[_State], _State]


def nearest_fit(
    run: RunConfig, config: PretrainedConfig, machine: Machine, workload: Workload
) -> NearestFit:  # fmt: skip
    """Changes settings of a run that does not fit on `machine` (every device holding everything) until it does.

    Dry-runs once for every change tried: some seconds. Where nothing helps the smallest run found is returned.
    """
    return search(run, workload, machine.memory_bytes, lambda r, w: peak_on(machine, r, config, w))


def search(
    run: RunConfig, workload: Workload, memory_bytes: int, peak_on_machine: Callable[[RunConfig, Workload], int]
) -> NearestFit:
    """The same, for any way to tell the peak of a run. An InputError of that: the change is none for this model."""
    known: dict[tuple[str, str, Workload], int] = {}

    def peak_of(state: _State) -> int:
        key = state.run.method, state.run.train.model_dump_json(), state.workload
        if key not in known:
            known[key] = peak_on_machine(state.run, state.workload)
        return known[key]

    start = _State(run, workload)
    state, peak = start, peak_of(start)
    made: list[_Change] = []
    for lever in (_recompute, _one_row, _narrow_states, _freeze, _quantise, *[_halve_row] * 16):
        if peak <= memory_bytes:
            break
        change = lever(state)
        if change is None:
            continue
        try:
            smaller = peak_of(change.apply(state))
        except InputError:
            continue
        if smaller < peak:
            state, peak = change.apply(state), smaller
            made.append(change)
    if peak <= memory_bytes:
        for change in made[:-1]:
            without = [other for other in made if other is not change]
            smaller = peak_of(_all(without, start))
            if smaller <= memory_bytes:
                made, peak = without, smaller
    settings: dict[str, str] = {}
    for change in made:
        settings |= {setting.partition("=")[0]: setting for setting in change.settings}
    return NearestFit(tuple(settings.values()), peak, max(0, peak - memory_bytes))


def _all(changes: list[_Change], state: _State) -> _State:
    for change in changes:
        state = change.apply(state)
    return state


def _recompute(state: _State) -> _Change | None:
    if state.run.train.recompute == "layers":
        return None
    return _Change(("train.recompute=layers",), lambda s: s.train(recompute="layers"))


def _one_row(state: _State) -> _Change | None:
    train = state.run.train
    if train.micro_batch == 1:
        return None
    accumulation = train.accumulation * train.micro_batch
    return _Change(
        ("train.micro_batch=1", f"train.accumulation={accumulation}"),
        lambda s: s.train(micro_batch=1, accumulation=accumulation),
    )


def _narrow_states(state: _State) -> _Change | None:
    if state.run.train.optimizer in ("adamw8bit", "adafactor"):
        return None
    return _Change(("train.optimizer=adamw8bit",), lambda s: s.train(optimizer="adamw8bit"))


def _freeze(state: _State) -> _Change | None:
    return _method("lora") if state.run.method == "full" else None


def _quantise(state: _State) -> _Change | None:
    return _method("qlora") if state.run.method == "lora" else None


def _method(name: str) -> _Change:
    return _Change((f"method={name}",), lambda s: replace(s, run=s.run.model_copy(update={"method": name})))


def _halve_row(state: _State) -> _Change | None:
    tokens = max(SHORTEST_ROW_TOKENS, state.workload.row_tokens // 2)
    if tokens >= state.workload.row_tokens:
        return None

    def shorter(state: _State) -> _State:
        return replace(state, workload=replace(state.workload, row_tokens=tokens))

    return _Change((f"data.max_tokens={tokens}",), shorter)
