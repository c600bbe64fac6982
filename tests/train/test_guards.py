"""What a run does when numbers, disks and validations go wrong: said, survived where it can be, and resumed."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import config_of, run, stop_after

from fitune.config.schema import RunConfig
from fitune.errors import FituneError, InputError, Interrupted
from fitune.step.objective import Measured
from fitune.train import loop
from fitune.train.best_weights import best_step
from fitune.train.checkpoint import _state_digest, list_checkpoints
from fitune.train.early_stopping import EarlyStopping
from fitune.train.loss_spikes import LEAST, SpikeWatch
from fitune.train.stall_watch import StallWatch

STEPS = 6


def spoil(monkeypatch: pytest.MonkeyPatch, *numbers: int, weights: bool = False) -> None:
    """Makes the loss of these updates (counted from 1, over the whole process) no number, as a bad batch would."""
    real, count = loop.update, itertools.count(1)

    def update(model: Any, batches: Any, *rest: Any) -> Any:
        if next(count) in numbers:
            for batch in batches:
                batch.weights[batch.weights > 0] = math.nan
        return real(model, batches, *rest)

    monkeypatch.setattr(loop, "update", update)


def test_a_step_without_numbers_stops_the_run_and_says_where(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3)
    with pytest.raises(FituneError, match=r"step 3: loss nan.*no weight was changed; .*train\.jsonl line"):
        run(config_of(place), tmp_path / "run")


def test_skipped_steps_are_told_and_the_run_goes_on_to_the_same_bits_when_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = config_of(place, "train.on_non_finite=skip")
    spoil(monkeypatch, 3)
    whole = run(config, tmp_path / "whole", say=said.append)
    assert [step for step, _ in whole.losses] == [1, 2, 4, 5, 6]
    assert any("step 3" in line and "skipped" in line for line in said)
    monkeypatch.undo()
    spoil(monkeypatch, 3)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(4))
    monkeypatch.undo()
    assert run(config, tmp_path / "parts", resume=True).digest == whole.digest


def test_too_many_skipped_steps_end_the_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 2, 3, 4)
    config = config_of(place, "train.on_non_finite=skip", "train.non_finite_limit=2")
    with pytest.raises(FituneError, match=r"step 4: .*2 such steps are allowed"):
        run(config, tmp_path / "run")


def test_going_back_takes_the_checkpoint_and_half_the_rate(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints every 2 steps: the failure of step 4 loses step 3, and step 5 is taken from step 2's weights."""
    said: list[str] = []
    config = config_of(place, "train.on_non_finite=lower_rate", "train.schedule=constant")
    spoil(monkeypatch, 4)
    whole = run(config, tmp_path / "whole", say=said.append)
    assert any("step-000002 again" in line and "0.5 of the schedule" in line for line in said)
    rates = {record.step: record.learning_rate for record in whole.records}
    assert rates[5] == pytest.approx(0.5 * rates[3])
    monkeypatch.undo()
    spoil(monkeypatch, 4)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(5))
    monkeypatch.undo()
    assert run(config, tmp_path / "parts", resume=True).digest == whole.digest


def test_going_back_is_the_same_where_the_run_was_stopped_before(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 3, where a checkpoint is written that the other run has not: both go back to step 2's."""
    config = config_of(place, "train.on_non_finite=lower_rate")
    spoil(monkeypatch, 4)
    whole = run(config, tmp_path / "whole")
    monkeypatch.undo()
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    spoil(monkeypatch, 1)  # the first of the resumed run: step 4
    assert run(config, tmp_path / "parts", resume=True).digest == whole.digest


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (["train.on_non_finite=lower_rate"], "train.save_every_steps=3"),
        (["train.validate_every_steps=1", "train.restore_best=true"], "train.validate_every_steps=2"),
    ],
)
def test_what_decides_the_result_is_not_free_to_change(
    place: Path, tmp_path: Path, settings: list[str], change: str
) -> None:
    own = [f"data.validation={place / 'validation.jsonl'}", *settings]
    with pytest.raises(Interrupted):
        run(config_of(place, *own), tmp_path / "run", watch=stop_after(3))
    name, _, value = change.partition("=")
    others = [setting for setting in own if not setting.startswith(f"{name}=")]
    with pytest.raises(InputError, match=rf"{name} was \d and is {value}"):
        run(config_of(place, *others, change), tmp_path / "run", resume=True)


def test_the_layer_is_named(place: Path, tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.graph.get_decoder().layers[1].post_attention_layernorm.weight.fill_(math.inf)

    from fitune.train.run import RunFolder, plan_run, prepare_run, train_run

    prepared = prepare_run(config_of(place))
    with pytest.raises(FituneError, match=r"first result that is not finite is that of \S*layers\.1"):
        train_run(prepared, plan_run(prepared, with_time=False), RunFolder(tmp_path / "run"), before=poison)


def validated(place: Path, *more: str) -> RunConfig:
    held_out = f"data.validation={place / 'validation.jsonl'}"
    return config_of(place, held_out, "train.validate_every_steps=1", "train.steps=12", *more)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation losses by the step after which they are taken."""
    monkeypatch.setattr(loop, "validate", lambda model, samples, rows, objective: Measured(next(found), None, None))
    found = iter(losses.values())


FALLING_THEN_RISING = {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.6, 5: 1.7, 6: 1.8, 7: 1.9}


def test_a_run_stops_when_validation_no_longer_falls_and_gives_its_best(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    scripted(monkeypatch, FALLING_THEN_RISING)
    stopped = run(
        validated(place, "train.early_stopping_patience=3", "train.restore_best=true"), tmp_path / "run",
        say=said.append,
    )  # fmt: skip
    assert [step for step, _ in stopped.losses] == [1, 2, 3, 4, 5, 6]
    assert any("stopped early: 3 validations in a row" in line and "after step 3" in line for line in said)
    assert any("learn the data by heart" in line for line in said)
    assert best_step(tmp_path / "run" / "best") == 3
    monkeypatch.undo()
    # The result is the model after step 3, to the bit: a run that was stopped there has it.
    short = validated(place)
    with pytest.raises(Interrupted):
        run(short, tmp_path / "short", watch=stop_after(3))
    from safetensors.torch import load_file

    best = load_file(tmp_path / "run" / "best" / "tensors.safetensors")
    there = load_file(tmp_path / "short" / "checkpoints" / "step-000003" / "tensors.safetensors")
    assert best
    assert all(torch.equal(value, there[name]) for name, value in best.items())
    given = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(value.double().sum().item() for value in given.values()) == sorted(
        value.double().sum().item() for value in best.values()
    )


def test_early_stopping_goes_on_counting_after_a_stop(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validated(place, "train.early_stopping_patience=3", "train.save_every_steps=1")
    scripted(monkeypatch, FALLING_THEN_RISING)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", watch=stop_after(5))
    monkeypatch.undo()
    scripted(monkeypatch, {6: 1.8})
    assert [step for step, _ in run(config, tmp_path / "run", resume=True).losses] == [6]
    assert run(config, tmp_path / "run", resume=True).losses == []  # it is over


def test_early_stopping_by_hand() -> None:
    found = EarlyStopping(patience=2, min_delta=0.1)
    assert [found.hear(step, loss) for step, loss in enumerate([2.0, 1.95, 1.89, 1.88, 1.80], 1)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert (found.best, found.best_step, found.is_over) == (1.89, 3, True)
    assert not EarlyStopping().is_over


def test_a_full_disk_ends_no_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real file system of 3 MB that is full, and later is not."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    said: list[str] = []
    try:
        whole = run(config_of(place, "train.steps=40"), tmp_path / "whole")
        filler = small / "filler"

        def watch(record: Any) -> None:
            if record.step == 1:
                free = shutil.disk_usage(small).free
                filler.write_bytes(b"x" * free)
            if record.step == 30:
                filler.unlink()

        outcome = run(config_of(place, "train.steps=40"), small / "run", watch=watch, say=said.append)
        assert outcome.digest == whole.digest
        assert any("ran full" in line and "tries again after step 12" in line for line in said)
        assert sum("waits until there is room" in line for line in said) == 2
        assert [path.name for path in list_checkpoints(small / "run" / "checkpoints")][-1] == "step-000040"
        lines = [json.loads(line) for line in (small / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 41))
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_spikes_stand_out_and_do_not_count_for_the_next() -> None:
    watch = SpikeWatch()
    assert [watch.hear(2.0 + 0.1 * (step % 3)) for step in range(LEAST)] == [None] * LEAST
    assert watch.hear(3.05) is None
    assert watch.hear(9.0) == pytest.approx(2.15, abs=0.1)
    assert watch.hear(2.1) is None
    assert watch.hear(9.0) is not None
    # What stays is told once, and is how losses are after a while.
    assert [watch.hear(9.0) for _ in range(2 * LEAST)] == [None] * (2 * LEAST)
    assert watch.hear(9.1) is None
    assert watch.hear(30.0) == pytest.approx(9.0, abs=0.1)


def test_a_spike_names_the_sample_that_made_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd.jsonl"
    plain = {"question": "Say a.", "answer": "a a a a a a a a"}
    strange = {"question": "Say a.", "answer": "zq~#9 ÿþ" * 4}
    odd.write_text("\n".join([json.dumps(plain)] * 40 + [json.dumps(strange)]))
    from fitune.train import loss_spikes

    monkeypatch.setattr(loss_spikes, "SHARE", 0.2)
    said: list[str] = []
    run(
        config_of(place, f"data.train={odd}", "data.pack=false", "train.steps=80", "train.accumulation=1"),
        tmp_path / "run", say=said.append,
    )  # fmt: skip
    spikes = [line for line in said if "stands out" in line]
    assert spikes
    assert all(f"{odd} line 41 (" in line for line in spikes)


def test_a_step_that_hangs_is_said_while_it_lasts() -> None:
    said: list[str] = []
    watch = StallWatch(said.append, least_seconds=0.2)
    for number in (1, 2, 3):
        with watch.step(number):
            time.sleep(0.01)
    assert said == []
    with watch.step(4):
        time.sleep(0.5)
        assert len(said) >= 1
    assert "step 4 takes" in said[0]
    count = len(said)
    time.sleep(0.3)
    assert len(said) == count


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["train.early_stopping_patience=2"], "train.early_stopping_patience: needs validations on the way"),
        (["train.restore_best=true"], "train.restore_best: needs validations on the way"),
        (["train.early_stopping_min_delta=0.1"], "train.early_stopping_min_delta: has no effect without"),
        (["train.schedule_power=3"], "train.schedule_power: has no effect on schedule cosine; it is of polynomial"),
        (["train.warmup_steps=6"], "train.warmup_steps: the run has 6 steps"),
        (["train.warmup_steps=2", "train.warmup_share=0.1"], "train.warmup_steps: given together with"),
        (["train.non_finite_limit=9"], "train.non_finite_limit: has no effect"),
        (["train.final_rate_share=0.1", "train.schedule=constant"], "train.final_rate_share: has no effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(place: Path, wrong: list[str], told: str) -> None:
    with pytest.raises(InputError) as refused:
        config_of(place, *wrong)
    field, _, words = told.partition(": ")
    assert f"override {wrong[0]}: {words}" in str(refused.value)
    assert wrong[0].startswith(field)


def test_what_changed_is_shown_and_refused_unless_told(place: Path, tmp_path: Path) -> None:
    from fitune.train.run import plan_run, prepare_run, train_run
    from fitune.train.run_folder import RunFolder

    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(config_of(place), folder, watch=stop_after(3))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join((place / "train.jsonl").read_text().splitlines()[:-1]))
    other = config_of(place, "train.learning_rate=0.02", "lora.dropout=0.1", f"data.train={fewer}")
    with pytest.raises(InputError) as refused:
        run(other, folder, resume=True)
    told = str(refused.value)
    for words in (
        "train.learning_rate was 0.01 and is 0.02",
        "lora.dropout was 0.0 and is 0.1",
        "fewer.jsonl",
        "the data changed: other samples than before",
        "step-000003",
        "--force",
    ):
        assert words in told
    assert [path.name for path in list_checkpoints(folder / "checkpoints")][-1] == "step-000003"
    said: list[str] = []
    prepared = prepare_run(other)
    done = train_run(
        prepared, plan_run(prepared, with_time=False), RunFolder(folder), resume=True, say=said.append, force=True
    )
    assert [step for step, _ in done.losses] == [4, 5, 6]
    assert any("train.learning_rate was 0.01 and is 0.02; going on all the same" in line for line in said)
    # A value that changes no bit may change without a word.
    assert run(config_of(place, "train.keep_checkpoints=5"), tmp_path / "free").digest


@pytest.mark.parametrize("edited", [False, True])
def test_a_run_of_a_version_with_fewer_settings_goes_on(place: Path, tmp_path: Path, edited: bool) -> None:
    with pytest.raises(Interrupted):
        run(config_of(place), tmp_path / "run", watch=stop_after(3))
    made_by_an_older_version(tmp_path / "run", "neftune_alpha", "trackers")
    said: list[str] = []
    if edited:
        with pytest.raises(InputError, match=r"train\.neftune_alpha was None and is 5\.0"):
            run(config_of(place, "train.neftune_alpha=5"), tmp_path / "run", resume=True)
    done = run(config_of(place), tmp_path / "run", resume=True, say=said.append)
    assert any("a version without train.neftune_alpha, train.trackers" in line for line in said)
    assert done.digest == run(config_of(place), tmp_path / "whole").digest


def made_by_an_older_version(folder: Path, *unknown: str) -> None:
    """Its settings without those fields, and checkpoints whose digests are of such settings."""
    path = folder / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.strip().split(":")[0] not in unknown))
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        state = json.loads((checkpoint / "state.json").read_text())
        del state["state_sha256"]
        state["identity"]["config"] = "of fewer settings"
        text = json.dumps({**state, "state_sha256": _state_digest(state)})
        (checkpoint / "state.json").write_text(text)


def test_another_shape_is_refused_even_then(place: Path, tmp_path: Path) -> None:
    from fitune.train.run import plan_run, prepare_run, train_run
    from fitune.train.run_folder import RunFolder

    with pytest.raises(Interrupted):
        run(config_of(place), tmp_path / "run", watch=stop_after(3))
    prepared = prepare_run(config_of(place, "lora.rank=3"))
    with pytest.raises(FituneError, match="checkpoint tensor"):
        train_run(prepared, plan_run(prepared, with_time=False), RunFolder(tmp_path / "run"), resume=True, force=True)
