"""Other programs hear of a run: the real ones, without a network, where they are installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_runs import config_of, run, stop_after

from fitune.errors import InputError, Interrupted
from fitune.train import trackers
from fitune.train.loop import StepRecord, ValidationRecord
from fitune.train.run_folder import RunFolder
from fitune.train.scalars import scalars_of
from fitune.train.scoring import ScoreRecord

KINDS = ("wandb", "mlflow", "trackio", "swanlab")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything in a folder of the test."""
    settings = {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_scalars_have_what_there_is() -> None:
    found = scalars_of(StepRecord(1, 0.1, 2.0, 1.5, 1e-4, 100, 50, 25.0, 10**9, 1.0))
    assert found["train/loss"] == 2.0
    assert "train/reward_margin" not in found
    score = ScoreRecord(1, 0.5, "bleu", 0.0, 1.0, {"bleu": 0.5, "chrf": 2.0}, 50, 0, 1.0)
    assert scalars_of(score) == {"score/bleu": 0.5, "score/chrf": 2.0}
    assert scalars_of(ValidationRecord(1, 1.5, 0.75)) == {"validation/loss": 1.5, "validation/reward_accuracy": 0.75}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_installed_is_said_before_anything_is_done(place: Path, tmp_path: Path, kind: str) -> None:
    if importlib.util.find_spec(kind) is not None:
        pytest.skip(f"{kind} is installed")
    with pytest.raises(InputError, match=rf"train\.trackers: {kind}: not installed; pip install {kind}"):
        run(config_of(place, f"train.trackers=[{kind}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_told_and_gone_on_with(place: Path, offline: Path, kind: str) -> None:
    pytest.importorskip(kind)
    said: list[str] = []
    config = config_of(place, f"train.trackers=[{kind}]", f"data.validation={place / 'validation.jsonl'}")
    with pytest.raises(Interrupted):
        run(config, offline / "run", watch=stop_after(3), say=said.append)
    key = json.loads((offline / "run" / "trackers.json").read_text())["id"]
    run(config, offline / "run", resume=True, say=said.append)
    assert json.loads((offline / "run" / "trackers.json").read_text())["id"] == key
    assert not [line for line in said if "is told nothing more" in line]
    if kind == "mlflow":
        assert told_to_mlflow(key) == {step: pytest.approx(loss) for step, loss in losses_of(offline / "run")}
    elif kind == "wandb":
        assert len(list((offline / "run" / "wandb").glob(f"offline-run-*-{key}"))) == 2
    elif kind == "swanlab":
        assert list((offline / "run" / "swanlab").iterdir())
    else:
        assert list((offline / "trackio").glob("*.db"))


def losses_of(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def told_to_mlflow(key: str) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = [one.experiment_id for one in client.search_experiments() if one.name == trackers.PROJECT]
    (found,) = client.search_runs([experiment], f"tags.fitune_run = '{key}'")
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == "6"
    return {one.step: one.value for one in client.get_metric_history(found.info.run_id, "train/loss")}


def test_one_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, *_: Any) -> None:
            self.steps = 0

        def log(self, scalars: Any, step: int) -> None:
            if step == 2:
                raise ConnectionError("no route to host")
            self.steps += 1

        def close(self, is_whole: bool) -> None:
            raise AssertionError("it was left before")

    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)  # type: ignore[arg-type]
    (tmp_path / "run").mkdir()
    said: list[str] = []
    told = trackers.Trackers(("wandb",), RunFolder(tmp_path / "run"), {}, said.append)
    for step in (1, 2, 3):
        told(ValidationRecord(step, 1.0))
    told.close(is_whole=True)
    assert said == ["warning: wandb is told nothing more of this run: ConnectionError: no route to host"]


class Hearing:
    """Keeps the account that it was begun with, and fails as it is told to."""

    begun: ClassVar[list[str]] = []
    fails: ClassVar[type[BaseException] | None] = None

    def __init__(self, name: str, key: str, *_: Any) -> None:
        self.begun.append(key)

    def log(self, scalars: Any, step: int) -> None:
        if self.fails is not None:
            raise self.fails

    def close(self, is_whole: bool) -> None:
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def hearing(monkeypatch: pytest.MonkeyPatch) -> type[Hearing]:
    monkeypatch.setattr(Hearing, "begun", [])
    monkeypatch.setattr(Hearing, "fails", None)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(trackers._KINDS, name, Hearing)  # type: ignore[arg-type]
    monkeypatch.setattr("fitune.train.run.check_trackers", lambda names: None)
    return Hearing


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path, hearing: type[Hearing]) -> None:
    """A folder may hold what a run left that died before its first checkpoint; a damaged note ends no run."""
    (tmp_path / "run").mkdir()
    folder, said = RunFolder(tmp_path / "run"), []
    for is_new in (True, False, True):
        trackers.Trackers(("wandb", "mlflow"), folder, {}, said.append, is_new)
    first, second, third = hearing.begun[::2]
    assert hearing.begun[1::2] == [first, second, third]
    assert first == second != third
    (tmp_path / "run" / "trackers.json").write_text("{")
    trackers.Trackers(("wandb",), folder, {}, said.append)
    assert hearing.begun[-1] not in (first, third)
    assert not said


def test_the_result_is_there_before_trackers_are_closed(
    place: Path, tmp_path: Path, hearing: type[Hearing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while one of them waits for its server loses nothing; one that ends the program does not end it."""
    monkeypatch.setattr(hearing, "close", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(place, "train.trackers=[wandb]"), tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "summary.json").is_file()
    monkeypatch.setattr(hearing, "fails", SystemExit)
    said: list[str] = []
    run(config_of(place, "train.trackers=[wandb]"), tmp_path / "other", say=said.append)
    assert [line for line in said if "wandb is told nothing more of this run: SystemExit" in line]


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_names_are_those_of_fields() -> None:
    config: dict[str, Any] = {
        "lora": {"rank_pattern": {r"layers\.[01].*": 8}, "alpha_pattern": {}, "rank": 4},
        "seed": 1,
    }
    assert list(trackers._flat(config)) == [
        ("lora.rank_pattern", json.dumps(config["lora"]["rank_pattern"])), ("lora.alpha_pattern", "{}"),
        ("lora.rank", 4), ("seed", 1),
    ]  # fmt: skip
