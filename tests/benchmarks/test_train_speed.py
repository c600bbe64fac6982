"""The benchmark's options, the form of its rows, what its workers read, and that workers say what went wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import speed_inputs
import torch
import train_speed
from speed_cases import CASES, MODELS, RANK, VARIANTS, chosen_cases
from speed_process import Worker, WorkerFailed
from speed_rounds import Method, PeerSide, Row, Trial, fastest_peer, start_peer, trial_sentence, turns
from tiny_case import TINY, TINY_CASE, tiny_inputs

from fitune.config import load
from fitune.models.find import find_model

ROW_FIELDS = {
    "case", "compute", "speed_ratio", "memory_ratio", "tokens_per_second", "peer_tokens_per_second", "peak_bytes",
    "peer_peak_bytes", "peer_variant",
}  # fmt: skip


def test_the_cases_are_those_asked_for() -> None:
    assert [case.name for case in train_speed.parse(["--quick"]).cases] == ["smollm2-4x512", "llama1b-2x512"]
    assert [case.name for case in train_speed.parse(["--cases", "qwen-2x512,smollm2-1x2048"]).cases] == [
        "qwen-2x512",
        "smollm2-1x2048",
    ]
    assert {case.name for case in chosen_cases([], False)} == CASES.keys() - {"alpaca"}
    assert {case.name for case in chosen_cases([], True)} == CASES.keys()
    assert {case.model for case in CASES.values()} == MODELS.keys()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--cases", "smollm"], "no case called smollm"),
        (["--cases", "alpaca"], "needs --alpaca"),
        (["--alpaca", "/nowhere.json"], "no file /nowhere.json"),
        (["--rounds", "0"], "--rounds"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_wrong_options_end_with_a_reason(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_speed.parse(arguments)
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_rows_have_the_promised_fields() -> None:
    row = Row(
        "a", "bfloat16", speed_ratio=2.5, memory_ratio=0.25, tokens_per_second=1000.0, peer_tokens_per_second=400.0,
        peak_bytes=10**9, peer_peak_bytes=4 * 10**9, peer_variant="pure bf16", trials=[Trial("pure bf16", 400.0, 1)],
    )  # fmt: skip
    found = json.loads(json.dumps(row.as_json()))
    assert found.keys() >= ROW_FIELDS
    assert found["trials"][0]["tokens_per_second"] == 400.0
    assert train_speed.row_cells(row) == [
        "a", "bfloat16", "1,000", "400", "2.50", "1.00", "4.00", "0.25", "pure bf16"
    ]  # fmt: skip
    refused = Row("a", "int8", recompute="layers", problem="fitune refuses it:\nno such format")
    assert train_speed.row_cells(refused) == [
        "a", "int8, recompute", *["-"] * 6, "fitune refuses it: no such format"
    ]  # fmt: skip
    assert len(train_speed.COLUMNS) == len(train_speed.row_cells(refused))


def test_variants_are_told_apart_by_name() -> None:
    assert len({variant.name for variant in VARIANTS}) == 4
    assert trial_sentence(Trial("x", note="left out: needs 12.8 GB, 3.0 are free")).endswith("3.0 are free")


@pytest.mark.parametrize(("ours", "peers"), [(5, 5), (7, 60), (6, 4), (1, 3)])
def test_both_sides_take_all_their_steps_in_turns(ours: int, peers: int) -> None:
    order = list(turns(ours, peers))
    assert [number for is_ours, number in order if is_ours] == list(range(ours))
    assert [number for is_ours, number in order if not is_ours] == list(range(peers))
    longest = max(len(run) for run in "".join("o" if is_ours else "p" for is_ours, _ in order).split("o"))
    assert longest <= -(-peers // ours)


def test_a_random_model_is_written_once_and_read_by_fitune(tmp_path: Path) -> None:
    folder = speed_inputs.model_folder(TINY, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert speed_inputs.model_folder(TINY, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    source = find_model(str(folder))
    assert "lm_head.weight" not in source.tensor_names()
    bias = source.read("model.layers.0.self_attn.q_proj.bias")
    matrix = source.read("model.layers.1.mlp.up_proj.weight").float()
    assert bias.dtype == torch.bfloat16
    assert bias.any()
    assert abs(float(matrix.std()) - speed_inputs.WEIGHT_STD) < 0.001
    assert bool((source.read("model.norm.weight") == 1).all())


def test_the_run_file_is_one_that_fitune_reads(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("[]")
    path = tmp_path / "run.yaml"
    speed_inputs.write_run_file(TINY_CASE, tmp_path, data, path, compute="float32", recompute="layers", threads=1)
    config = load(path)
    assert (config.lora.rank, config.train.recompute, config.train.micro_batch) == (RANK, "layers", 2)


def test_alpaca_samples_are_the_same_every_time(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    file.write_text(json.dumps([{"instruction": f"say {n}", "output": str(n)} for n in range(500)]))
    for name in ("one", "two"):
        speed_inputs.write_some_samples(file, 2, tmp_path / name)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    assert len(json.loads((tmp_path / "one").read_text())) == 2 * speed_inputs.SAMPLES_PER_ROUND
    file.write_text("{}")
    with pytest.raises(ValueError, match="JSON list"):
        speed_inputs.write_some_samples(file, 2, tmp_path / "three")


def test_a_worker_says_that_fitune_refuses(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    run_file = tmp_path / "run.yaml"
    speed_inputs.write_run_file(
        TINY_CASE, tmp_path, tmp_path / "data.json", run_file, compute="int3", recompute="none", threads=1
    )
    spec = {"side": "fitune", "run_file": str(run_file), "steps": None, "adapter": str(tmp_path)}
    with pytest.raises(WorkerFailed, match=r"train\.compute") as failed:
        Worker(spec, tmp_path, 1)
    assert failed.value.is_refusal


@pytest.mark.slow
def test_every_format_takes_turns_with_the_same_steps_of_the_peer(tmp_path: Path) -> None:
    inputs = dataclasses.replace(tiny_inputs(tmp_path), adapter=tmp_path / "adapter")
    method = Method(rounds=2, warm_steps=1, trial_steps=1, threads=1)
    worker = start_peer(inputs, VARIANTS[0], method)
    try:
        worker.step()
        peer = PeerSide(VARIANTS[0], worker, 1, [])
        narrow, refused, wide = train_speed.our_rows(
            inputs, peer, method, ["bfloat16", "int3", "float32"], "none"
        )  # fmt: skip
    finally:
        worker.close()
    assert refused.problem is not None
    assert refused.problem.startswith("fitune refuses it")
    assert (narrow.compute, wide.compute) == ("bfloat16", "float32")
    assert narrow.peer_step_seconds == wide.peer_step_seconds
    for row in (narrow, wide):
        assert row.problem is None
        assert len(row.step_seconds) == len(row.peer_step_seconds) == method.rounds
        assert row.largest_loss_difference is not None
        assert row.largest_loss_difference < 0.02
    assert narrow.losses != wide.losses


@pytest.mark.slow
def test_a_quick_search_times_the_first_variant_beside_the_next(tmp_path: Path) -> None:
    inputs = dataclasses.replace(tiny_inputs(tmp_path), adapter=tmp_path / "adapter")
    method = Method(rounds=1, warm_steps=1, trial_steps=1, threads=1, is_quick=True)
    said: list[str] = []
    peer = fastest_peer(inputs, VARIANTS[:2], method, said.append)
    try:
        assert peer.trials[0].note == "timed beside the next"
        assert peer.trials[1].tokens_per_second is not None
        assert peer.variant in VARIANTS[:2]
        assert len(peer.worker.losses) == peer.warm_steps == 2
    finally:
        peer.worker.close()
    alone = fastest_peer(inputs, VARIANTS[:1], method, said.append)
    alone.worker.close()
    assert alone.variant == VARIANTS[0]
