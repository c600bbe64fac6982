"""Whole runs of a tiny model: checkpoints, going on after a stop, damage, refusals, validation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import STEPS, adapter_bits, config_of, run, stop_after

from fitune.config import load
from fitune.data import encoded_file
from fitune.errors import DiskFullError, InputError, Interrupted, MemoryShortError
from fitune.train import loop, memory_watch
from fitune.train.checkpoint import list_checkpoints, newest_whole
from fitune.train.run import Outcome, plan_run, prepare_run, resumed, train_run
from fitune.train.run_folder import RunFolder
from tiny_models import write_questions


def test_noise_on_embeddings_is_in_training_alone_and_the_same_when_resumed(place: Path, tmp_path: Path) -> None:
    validated = (f"data.validation={place / 'validation.jsonl'}", "train.learning_rate=1e-9")
    quiet, noisy = (
        run(config_of(place, *validated, *more), tmp_path / name)
        for name, more in (("quiet", []), ("noisy", ["train.neftune_alpha=20"]))
    )
    assert abs(quiet.losses[0][1] - noisy.losses[0][1]) > 1e-4
    assert quiet.validation[-1][1] == pytest.approx(noisy.validation[-1][1], abs=1e-6)
    config = config_of(place, "train.neftune_alpha=20")
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", watch=stop_after(3))
    run(config, tmp_path / "parts", resume=True)
    assert adapter_bits(tmp_path / "parts") == adapter_bits(tmp_path / "whole")


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Outcome:
    return run(config_of(place), place / "uninterrupted")


def test_a_run_learns_and_leaves_what_it_promises(place: Path, uninterrupted: Outcome) -> None:
    folder = uninterrupted.folder.path
    assert uninterrupted.losses[-1][1] < uninterrupted.losses[0][1]
    names = {"config.yaml", "plan.json", "metrics.jsonl", "summary.json", "adapter", "checkpoints"}
    assert names <= {path.name for path in folder.iterdir()}
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-000004", "step-000006"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["sha256"] == uninterrupted.digest
    again = run(load(folder / "config.yaml", [f"output={place / 'again'}"]), place / "again")
    assert again.digest == uninterrupted.digest
    assert adapter_bits(place / "again") == adapter_bits(folder)


def test_tokens_kept_on_disk_train_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = ["data.validation=0.2", "data.over_length=cut", "data.max_tokens=96"]
    in_memory = run(config_of(place, *shares), tmp_path / "memory")
    monkeypatch.setattr(encoded_file, "KEPT_FROM_BYTES", 1)
    with pytest.raises(Interrupted):
        run(config_of(place, *shares), tmp_path / "disk", watch=stop_after(3))
    monkeypatch.setattr(encoded_file, "encode_samples", lambda *_: pytest.fail("encoded again"))
    on_disk = run(config_of(place, *shares), tmp_path / "disk", resume=True)
    assert on_disk.digest == in_memory.digest
    assert on_disk.validation == in_memory.validation


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(place: Path, uninterrupted: Outcome, step: int) -> None:
    folder = place / f"stopped-{step}"
    with pytest.raises(Interrupted, match=f"stopped after step {step} of {STEPS}; everything is saved"):
        run(config_of(place), folder, watch=stop_after(step))
    resumed = run(config_of(place), folder, resume=True)
    assert resumed.digest == uninterrupted.digest
    assert [number for number, _ in resumed.losses] == list(range(step + 1, STEPS + 1))
    assert resumed.losses == uninterrupted.losses[step:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_a_run_that_memory_runs_short_for_saves_and_goes_on(
    place: Path, uninterrupted: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([9, 1.5, 1.5, 1.05])  # GB after each step
    monkeypatch.setattr(
        memory_watch, "present", lambda: memory_watch.Present(20 * 10**9, int(next(free) * 10**9), 2 * 10**9, 10**9)
    )
    said: list[str] = []
    folder = place / "short"
    with pytest.raises(
        MemoryShortError, match=rf"after step 4 of {STEPS}: memory runs short: 50 MB .* is saved. Go on"
    ):
        run(config_of(place), folder, say=said.append)
    assert [line for line in said if "memory" in line] == [
        "warning: memory runs short: 500 MB of 20.0 GB would be left in the next step"
    ]
    monkeypatch.undo()
    assert run(config_of(place), folder, resume=True).digest == uninterrupted.digest


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.dropout=0.2"],
        ["train.optimizer=adamw8bit", "lora.rank=64"],
        ["train.optimizer=lion", "train.learning_rate=0.001", "train.weight_decay=0.1"],
        ["train.optimizer=adafactor"],
        ["train.model_dropout=0.2", "train.recompute=layers", "data.pack=false"],
        ["method=lora"],
        ["method=full", "train.compute=bfloat16", "train.learning_rate=0.001"],
        ["method=full", "train.optimizer_states=disk", "train.recompute=layers", "train.learning_rate=0.001"],
        ["method=full", "train.optimizer_states=disk", "train.optimizer=adamw8bit", "train.learning_rate=0.001"],
        ["train.compute=int8", "train.recompute=layers"],
        ["train.compute=float16", "lora.dropout=0.2"],
        ["method=full", "train.compute=float16", "train.optimizer_states=disk", "train.learning_rate=0.001"],
    ],
)
def test_what_else_has_a_state_goes_on_too(place: Path, overrides: list[str]) -> None:
    name = "".join(letter for letter in str(overrides) if letter.isalnum())
    config = config_of(place, *overrides)
    whole = run(config, place / f"{name}-whole")
    with pytest.raises(Interrupted):
        run(config, place / f"{name}-stopped", watch=stop_after(3))
    assert run(config, place / f"{name}-stopped", resume=True).digest == whole.digest


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_where_the_states_lie_changes_nothing(place: Path, optimizer: str) -> None:
    """Begun in memory, gone on with on disk, ended in memory: one run, and no file left behind."""
    config, disk = (
        config_of(
            place, "method=full", "train.learning_rate=0.001", f"train.optimizer={optimizer}",
            f"train.optimizer_states={where}",
        )
        for where in ("memory", "disk")
    )  # fmt: skip
    whole = run(config, place / f"{optimizer}-in-memory")
    other = run(disk, place / f"{optimizer}-on-disk")
    assert (other.digest, other.losses) == (whole.digest, whole.losses)
    tensors = Path("checkpoints", "step-000006", "tensors.safetensors")
    assert (other.folder.path / tensors).read_bytes() == (whole.folder.path / tensors).read_bytes()
    folder = place / f"{optimizer}-moved"
    with pytest.raises(Interrupted):
        run(config, folder, watch=stop_after(2))
    with pytest.raises(Interrupted):
        run(disk, folder, resume=True, watch=stop_after(4))
    assert run(config, folder, resume=True).digest == whole.digest
    assert {path.name for path in other.folder.path.iterdir()} == {path.name for path in whole.folder.path.iterdir()}


def test_validation_samples_may_be_longer_than_all_of_training(place: Path) -> None:
    write_questions(place / "longer.jsonl", 3, first=10**40)
    validation = f"data.validation={place / 'longer.jsonl'}"
    outcome = run(config_of(place, "data.pack=false", validation, "train.steps=1"), place / "longer")
    assert len(outcome.validation) == 1


def test_a_disk_too_small_for_the_states_is_told_before_the_model_is_built(place: Path) -> None:
    prepared = prepare_run(config_of(place, "method=full", "train.optimizer_states=disk"))
    plan = plan_run(prepared, with_time=False)
    trained = next(item.value for item in plan.memory if item.name == "trained weights")
    assert plan.disk_bytes == pytest.approx(3 * trained, rel=0.01)
    folder = RunFolder(place / "small-disk")
    with pytest.raises(DiskFullError, match=r"small-disk: .* disk needs 1152921504\.61 GB there"):
        train_run(prepared, replace(plan, disk_bytes=1 << 60), folder)
    assert not list_checkpoints(folder.checkpoints)


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip_a_bit(folder / "tensors.safetensors", -5),
    "cut short": lambda folder: (folder / "tensors.safetensors").write_bytes(
        (folder / "tensors.safetensors").read_bytes()[:-100]
    ),
    "gone": lambda folder: (folder / "tensors.safetensors").unlink(),
    "another step": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 5', '"step": 4')
    ),
    "half a state": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:40]),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(
    place: Path, uninterrupted: Outcome, kind: str, keep: int
) -> None:
    config = config_of(place, f"train.keep_checkpoints={keep}", "train.save_every_steps=4")
    folder = place / f"damaged-{kind.replace(' ', '-')}-{keep}"
    with pytest.raises(Interrupted):  # leaves step 4 or, where two are kept, 4 and 5
        run(config, folder, watch=stop_after(5))
    checkpoints = folder / "checkpoints"
    DAMAGE[kind](checkpoints / "step-000005")
    said: list[str] = []
    if keep == 1:
        with pytest.raises(InputError, match="there is no checkpoint to go on from"):
            run(config, folder, resume=True, say=said.append)
    else:
        resumed = run(config, folder, resume=True, say=said.append)
        assert resumed.digest == uninterrupted.digest
        assert "going on from step-000004" in said
        assert newest_whole(checkpoints)[0] == checkpoints / "step-000006"
    assert any("step-000005" in line for line in said)


def test_damaged_checkpoints_do_not_push_out_whole_ones(place: Path, uninterrupted: Outcome) -> None:
    config = config_of(place, "train.keep_checkpoints=2", "train.save_every_steps=1")
    folder = place / "pushed-out"
    with pytest.raises(Interrupted):
        run(config, folder, watch=stop_after(4))
    checkpoints = folder / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000003", "step-000004"]
    DAMAGE["a flipped bit"](checkpoints / "step-000004")
    # It goes on from 3, is stopped at 4 again: the damaged one must be replaced, and 3 stay beside it.
    with pytest.raises(Interrupted):
        run(config, folder, resume=True, watch=stop_after(4))
    assert newest_whole(checkpoints) == (checkpoints / "step-000004", [])
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000003", "step-000004"]
    assert run(config, folder, resume=True).digest == uninterrupted.digest


def test_another_run_is_not_gone_on_with(place: Path) -> None:
    folder = place / "another"
    with pytest.raises(Interrupted):
        run(config_of(place), folder, watch=stop_after(2))
    with pytest.raises(InputError, match="holds a run already"):
        run(config_of(place), folder)
    with pytest.raises(InputError, match=r"train\.learning_rate was 0\.01 and is 0\.02"):
        run(config_of(place, "train.learning_rate=0.02"), folder, resume=True)
    original = (place / "train.jsonl").read_text()
    try:
        write_questions(place / "train.jsonl", 25)
        with pytest.raises(InputError, match="the data changed"):
            run(config_of(place), folder, resume=True)
    finally:
        (place / "train.jsonl").write_text(original)
    with pytest.raises(InputError, match="there is no checkpoint to go on from"):
        run(config_of(place), place / "nothing-here", resume=True)


def test_only_one_process_works_in_a_run_folder(place: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fitune.train.run_folder import RunFolder\n"
        f"folder = RunFolder(Path({str(place / 'locked')!r})); folder.lock(); print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match="another process is working in this run folder"):
            run(config_of(place), place / "locked")
        other.kill()
    run(config_of(place, "train.steps=1"), place / "locked")


def test_validation_changes_nothing(place: Path, uninterrupted: Outcome) -> None:
    overrides = [f"data.validation={place / 'validation.jsonl'}", "lora.dropout=0.2"]
    often = run(config_of(place, *overrides, "train.validate_every_steps=1"), place / "often")
    never = run(config_of(place, "lora.dropout=0.2"), place / "never")
    assert often.digest == never.digest
    assert [step for step, _ in often.validation] == list(range(1, STEPS + 1))
    assert often.validation[-1][1] < often.validation[0][1]


def test_chosen_settings_stay_when_a_run_goes_on(place: Path, tmp_path: Path) -> None:
    config = config_of(place, "method=auto", "memory=auto")
    prepared = prepare_run(config, with_time=False)
    plan = plan_run(prepared)
    assert prepared.config.method == "lora"  # all of it fits
    assert [choice.setting for choice in plan.choices] == ["method"]
    assert plan.fits
    train_run(prepared, plan, RunFolder(tmp_path / "whole"))
    stopped = RunFolder(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train_run(prepared, plan, stopped, watch=stop_after(3))
    again = resumed(config, stopped)
    assert again.method == "lora"
    goes_on = prepare_run(again, choose=False)
    train_run(goes_on, plan_run(goes_on, with_time=False), stopped, resume=True)
    assert adapter_bits(stopped.path) == adapter_bits(tmp_path / "whole")


def test_a_budget_that_nothing_fits_into_is_refused_before_anything_is_trained(place: Path) -> None:
    with pytest.raises(InputError, match="are too few: the least that this run takes is"):
        prepare_run(config_of(place, "method=auto", "memory=60MB"), with_time=False)


def test_counting_very_many_rows_is_not_silent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WATCHED_ROWS", 1)
    heard: list[tuple[str, int]] = []
    prepared = prepare_run(
        config_of(place, "train.steps=null", "train.epochs=2", "data.max_tokens=128"),
        watch=lambda what, samples: heard.append((what, samples)),
    )
    count = len(prepared.data.train)
    rows = {epoch: [samples for what, samples in heard if what == f"rows of epoch {epoch}"] for epoch in (1, 2)}
    for found in rows.values():
        assert len(found) > 2
        assert found == sorted(found)
        assert found[-1] == count
    assert heard[0][0] == f"{place / 'train.jsonl'} as tokens"
