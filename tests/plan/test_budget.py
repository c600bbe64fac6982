"""Fitting a run into so many bytes: what is given up first, what is refused, and what is said then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fitune.config.schema import RunConfig
from fitune.errors import InputError
from fitune.hardware import Hardware
from fitune.plan.budget import MARGIN, Fitted, budget_bytes, fit, is_wanted

GB = 10**9
OWN = GB // 2
ROW_TOKENS = 512


@dataclass(frozen=True)
class Held:
    """Four layers of 1 GB each in 4 bits, or 4 in 16, and 1 MB a token that is saved."""

    run: RunConfig
    row_tokens: int
    layers: int = 4

    def bytes(self, resident_layers: int | None) -> int:
        train = self.run.train
        saved = train.micro_batch * self.row_tokens * (200_000 if train.recompute == "layers" else 1_000_000)
        if self.run.method != "qlora":
            return 16 * GB + saved
        return (self.layers if resident_layers is None else min(self.layers, resident_layers + 2)) * GB + saved


def run_of(method: str = "qlora", memory: str | None = None, **train: Any) -> RunConfig:
    settings = {"method": method, "memory": memory, "data": {"train": ["none"]}, "train": train}
    return RunConfig.model_validate(settings)


def fitted(run: RunConfig, gigabytes: float) -> Fitted:
    return fit(run, ROW_TOKENS, round(gigabytes * GB), OWN, Held)


def hardware(total: float, available: float) -> Hardware:
    return Hardware("", 2, frozenset(), int(total * GB), int(available * GB))


@pytest.mark.parametrize("gigabytes", [7.5, 7.0, 5.5, 5.2, 4.9, 4.0, 3.0])
@pytest.mark.parametrize("method", ["auto", "qlora"])
def test_what_is_chosen_is_within_the_budget(method: str, gigabytes: float) -> None:
    found = fitted(run_of(method), gigabytes)
    peak = OWN + Held(found.run, ROW_TOKENS).bytes(found.run.train.resident_layers)
    assert peak == found.peak_bytes
    assert peak * MARGIN <= gigabytes * GB


def test_less_memory_never_makes_a_quicker_run() -> None:
    chosen = [fitted(run_of("auto"), gigabytes).choices for gigabytes in (30, 7.5, 5.5, 3.0)]
    assert [next(c.value for c in choices if c.setting == "method") for choices in chosen] == [
        "lora", "qlora", "qlora", "qlora",
    ]  # fmt: skip
    settings = [{choice.setting for choice in choices} for choices in chosen]
    assert "train.resident_layers" not in settings[1]
    assert "train.resident_layers" in settings[3]


def test_as_many_layers_stay_as_fit() -> None:
    found = fitted(run_of(micro_batch=1, recompute="layers"), 4.0)
    resident = found.run.train.resident_layers
    assert resident is not None
    held = Held(found.run, ROW_TOKENS)
    assert (OWN + held.bytes(resident)) * MARGIN <= 4.0 * GB < (OWN + held.bytes(resident + 1)) * MARGIN


def test_a_refusal_says_how_much_is_missing_and_what_would_fit() -> None:
    with pytest.raises(InputError) as caught:
        fitted(run_of(micro_batch=8, recompute="none", resident_layers=0), 5.0)
    least = (OWN + 2 * GB + 8 * 512_000_000) * MARGIN / GB
    said = str(caught.value)
    assert f"{least:.2f} GB" in said
    assert f"{least - 5.0:.2f} GB more" in said
    assert "Rows of 256 tokens would fit (data.max_tokens=256)" in said


def test_what_no_row_length_helps_is_said_so() -> None:
    with pytest.raises(InputError, match="Shorter rows alone do not help"):
        fitted(run_of("lora"), 8.0)


def test_budgets_are_wanted_where_asked_for() -> None:
    assert not is_wanted(run_of())
    assert is_wanted(run_of("auto"))
    assert is_wanted(run_of(memory="4GB"))


def test_auto_is_what_is_left_with_what_this_process_holds() -> None:
    assert budget_bytes(run_of(memory="auto"), hardware(16, 10), GB) == 11 * GB
    assert budget_bytes(run_of("auto"), hardware(16, 10), GB) == 11 * GB
    assert budget_bytes(run_of(memory="4GB"), hardware(16, 10), GB) == 4 * GB


def test_a_container_whose_limit_is_in_whole_pages_has_what_was_asked_for() -> None:
    limited = Hardware("", 2, frozenset(), 2_820_000_000 // 4096 * 4096, 2_300_000_000)
    assert budget_bytes(run_of(memory="2.82GB"), limited, GB // 2) == 2_800_000_000


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("16.1GB", "more than the 16.00 GB this machine"),
        ("32GB", "more than the 16.00 GB this machine"),
        ("12GB", "11.00 GB of 16.00 GB are"),
    ],
)
def test_more_than_there_is_is_refused(memory: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        budget_bytes(run_of(memory=memory), hardware(16, 10), GB)


@pytest.mark.parametrize("memory", ["much", "16", "16 parsecs", "0GB", ""])
def test_nonsense_is_refused_when_the_file_is_read(memory: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        run_of(memory=memory)
