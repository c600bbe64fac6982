"""Real processes that share a step: the same update as one process makes, whatever the split."""

from __future__ import annotations

import copy
import multiprocessing
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.data.collation import collate
from fitune.errors import FituneError, InputError
from fitune.step.optimizer import make_optimizer
from fitune.step.ranks import ALONE, BUCKET_BYTES, Processes, Ranks, _buckets, joined
from fitune.step.update import NonFiniteError, update
from tiny_models import adapted, distance, model_of, random_samples

COUNT = 3
LENGTHS = [5, 40, 23, 9, 31, 17, 12]
SPLITS = [[1, 2, 3, 1], [3, 2, 1, 1], [1] * 7]


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def together(work: Any, count: int, folder: Path) -> list[Any]:
    """What `work(ranks)` gives in each of `count` processes, which torchrun's variables tell of each other."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    started = [
        context.Process(target=_run, args=(work, rank, count, port, folder / f"{rank}.pt"), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _run(work: Any, rank: int, count: int, port: str, path: Path) -> None:
    import os

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    torch.set_num_threads(1)
    with joined() as ranks:
        assert (ranks.rank, ranks.count, ranks.local_count) == (rank, count, count)
        torch.save(work(ranks), path)


def one_update(split: list[int], ranks: Ranks, poison: bool = False) -> dict[str, Any]:
    """Gradients (a step of SGD at rate 1 tells them) and what the step says, of unequal micro-batches."""
    model, _ = adapted(copy.deepcopy(model_of("llama")))
    samples = random_samples(LENGTHS)
    bounds = [sum(split[:number]) for number in range(len(split) + 1)]
    batches = [collate([samples[a:b]], 512, 0) for a, b in pairwise(bounds)]
    if poison:
        model.graph.model.layers[1].input_layernorm.weight.data[3] = torch.nan if ranks.rank == 1 else 1.0
    before = torch.cat([parameter.detach().flatten().double() for parameter in model.trainable])
    optimizer = torch.optim.SGD(model.trainable, lr=0.0)
    try:
        result = update(model, batches, optimizer, 1.0, 0.0, ranks=ranks)
    except NonFiniteError as error:
        return {"error": str(error), "same": True}
    after = torch.cat([parameter.detach().flatten().double() for parameter in model.trainable])
    ranks.check_equal(model.trainable)
    return {"gradient": (before - after).float(), "loss": result.loss, "norm": result.grad_norm,
            "tokens": result.tokens, "trained": result.trained_tokens}  # fmt: skip


def everything(ranks: Ranks) -> dict[str, Any]:
    """All that is looked at, in one go: processes take seconds to start."""
    return {
        "splits": [one_update(split, ranks) for split in SPLITS], "messages": messages(ranks),
        "poisoned": one_update([4, 3], ranks, poison=True), "weights": three_steps(ranks),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(everything, COUNT, tmp_path_factory.mktemp("ranks"))


def test_an_update_does_not_depend_on_how_many_processes_share_it(found: list[dict[str, Any]]) -> None:
    """Against a single batch in a single process; of four micro-batches in three processes one has two."""
    whole = one_update([len(LENGTHS)], ALONE)
    assert float(whole["gradient"].norm()) == pytest.approx(whole["norm"], rel=1e-3)
    for one in [one for process in found for one in process["splits"]]:
        assert distance(one["gradient"], whole["gradient"]) < 1e-5
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5)
        assert one["trained"] == whole["trained"]


def test_what_is_not_finite_in_one_process_changes_nothing_in_any(found: list[dict[str, Any]]) -> None:
    assert all("nan" in process["poisoned"]["error"] for process in found)


def messages(ranks: Ranks) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    unused = torch.nn.Parameter(torch.zeros(2))
    if ranks.rank == 1:
        parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    ranks.add_gradients([parameter, unused])
    ranks.check_equal([parameter])
    differing = ""
    try:
        ranks.check_equal([torch.tensor([float(ranks.rank)])])
    except FituneError as error:
        differing = str(error)
    return {
        "sums": ranks.sums([1.0, float(ranks.rank)]), "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "gradient": parameter.grad, "unused": unused.grad is None, "told": ranks.told(f"by {ranks.rank}"),
        "each": ranks.each(torch.tensor([ranks.rank])), "differing": differing, "seed": ranks.seed(7),
    }  # fmt: skip


def test_what_processes_tell_each_other(found: list[dict[str, Any]]) -> None:
    told = [process["messages"] for process in found]
    assert told[0]["seed"] == 7
    assert len({one["seed"] for one in told}) == COUNT
    for one in told:
        assert one["sums"] == [3.0, 3.0]
        assert one["any"] == [True, False]
        assert one["gradient"].tolist() == [1.0, 2.0, 3.0]  # although only process 1 had any
        assert one["unused"]
        assert one["told"] == "by 0"
        assert [int(each) for each in one["each"]] == [0, 1, 2]
        assert "process 1 are not those of process 0" in one["differing"]


def test_gradients_go_over_in_parts_of_one_type() -> None:
    quarter = BUCKET_BYTES // 16
    tensors = [torch.empty(quarter) for _ in range(5)] + [torch.empty(3, dtype=torch.bfloat16)]
    assert [len(bucket) for bucket in _buckets(tensors)] == [4, 1, 1]
    assert [one for bucket in _buckets(tensors) for one in bucket][2] is tensors[2]


def test_variables_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as ranks:
        assert ranks is ALONE
        assert not isinstance(ranks, Processes)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="'two' is no number of processes"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT are not set; start it by torchrun"),
        joined(),
    ):
        pass


def test_an_optimizer_makes_the_same_change_in_all_processes(found: list[dict[str, Any]]) -> None:
    assert all(torch.equal(process["weights"], found[0]["weights"]) for process in found)
    alone, before = three_steps(ALONE), three_steps(ALONE, steps=0)
    assert distance(found[0]["weights"] - before, alone - before) < 1e-3


def three_steps(ranks: Ranks, steps: int = 3) -> torch.Tensor:
    model, _ = adapted(copy.deepcopy(model_of("llama")))
    samples = random_samples(LENGTHS)
    batches = [collate([[sample]], 512, 0) for sample in samples]
    optimizer = make_optimizer("adamw", model.trainable, (0.9, 0.999), 0.1, "reference")
    for _ in range(steps):
        update(model, batches, optimizer, 1e-3, 0.5, ranks=ranks)
    return torch.cat([parameter.detach().flatten() for parameter in model.trainable])
