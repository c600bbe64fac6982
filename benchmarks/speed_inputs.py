"""What both sides of `train_speed.py` read: a folder of 16-bit weights, a run file, and the same rows of tokens."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from speed_cases import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MICRO_BATCH,
    MODELS,
    PEER_BATCH_SAMPLES,
    RANK,
    ROW_TOKENS,
    SAMPLES_PER_ROUND,
    SEED,
    Case,
    Model,
)
from transformers import AutoConfig

from fitune.atomic import new_folder
from fitune.config import load
from fitune.data.dataset import load_training_data
from fitune.models.find import find_model
from fitune.models.graph import build_graph
from fitune.models.shards import TensorPlan, plan_shards, write_shards

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHT_STD = 0.02
MAX_SHARD_BYTES = 2_000_000_000
# More different steps than this need no batches of their own: the rows begin anew.
DIFFERENT_STEPS = 64
TEXT_MODEL = "smollm2-135m"  # whose tokenizer makes rows for the models that have none


@dataclass(frozen=True)
class Inputs:
    """What the workers of one case read.

    Attributes:
        steps: the file of the peer's steps; ours too where the rows are fixed.
        data: the training data that the run file names.
        adapter: the folder of the adapter that all begin with; the first worker of the peer writes it. None: our
            side alone, which begins with a fresh one.
    """

    case: Case
    model: Path
    steps: Path
    data: Path
    adapter: Path | None
    scratch: Path


def prepared_inputs(
    case: Case, cache: Path, scratch: Path, alpaca: Path | None, rounds: int, different_steps: int = DIFFERENT_STEPS
) -> Inputs:
    """Writes all that the workers of a case read; of fixed rows so many different steps, else samples by rounds."""
    scratch.mkdir()
    model = model_folder(MODELS[case.model], cache)
    inputs = Inputs(case, model, scratch / "steps.json", scratch / "data.json", scratch / "adapter", scratch)
    if case.has_fixed_rows:
        write_text_rows(case, model, model_folder(MODELS[TEXT_MODEL], cache), inputs.steps, different_steps)
        inputs.data.write_text("[]")  # the run file must name one
    else:
        assert alpaca is not None
        write_some_samples(alpaca, rounds, inputs.data)
        run_file = scratch / "peer.yaml"
        write_run_file(case, model, inputs.data, run_file, compute="auto", recompute="none", threads=1)
        write_padded_batches(run_file, inputs.steps)
    return inputs


def model_folder(model: Model, cache: Path) -> Path:
    """The checkpoint of `model` in `cache`, written now if it is not there (whole, or not at all)."""
    folder = cache / model.name
    if not folder.is_dir():
        with new_folder(folder) as beside:
            if model.shape is None:
                _write_bundled(beside)
            else:
                _write_random(dict(model.shape), beside)
    return folder


def _write_bundled(folder: Path) -> None:
    source = find_model("bundled")
    plans = [TensorPlan(name, source.shape(name), source.dtype(name)) for name in source.tensor_names()]
    write_shards(folder, plan_shards(plans, MAX_SHARD_BYTES), source.read)
    source.write_companions(folder)


def _write_random(shape: dict[str, Any], folder: Path) -> None:
    """Matrices and biases drawn from a normal distribution, norms at what the model begins with; bfloat16."""
    config = AutoConfig.for_model(**shape)
    graph = build_graph(config, torch.bfloat16)
    tied = set(graph.all_tied_weights_keys)
    shapes = {name: tuple(value.shape) for name, value in graph.named_parameters() if name not in tied}
    norm_start = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight

    def read(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.full(shapes[name], norm_start, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shapes[name]).normal_(0.0, WEIGHT_STD, generator=generator).to(torch.bfloat16)

    plans = [TensorPlan(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    write_shards(folder, plan_shards(plans, MAX_SHARD_BYTES), read)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def project_text() -> str:
    """The project's own documentation: real text that is always at hand."""
    paths = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def text_pieces(model: Path, tokenizer_of: Path, piece_tokens: int) -> Iterator[list[int]]:
    """The project's text cut into pieces of so many tokens, one after the other, from its start again.

    A model without a tokenizer of its own gets the ids of another one's, modulo its vocabulary.
    """
    ids = find_model(str(tokenizer_of)).tokenizer()(project_text(), verbose=False)["input_ids"]
    vocabulary = int(find_model(str(model)).config.vocab_size)
    place = 0
    while True:
        yield [ids[(place + offset) % len(ids)] % vocabulary for offset in range(piece_tokens)]
        place += piece_tokens


def write_text_rows(
    case: Case, model: Path, tokenizer_of: Path, path: Path, different_steps: int = DIFFERENT_STEPS
) -> None:
    """The project's text as the steps of a case of fixed rows."""
    rows = text_pieces(model, tokenizer_of, case.row_tokens)
    trained = [False] + [True] * (case.row_tokens - 1)
    steps = [
        [{"tokens": next(rows), "trained": trained} for _ in range(case.rows)]
        for _ in range(different_steps)
    ]  # fmt: skip
    path.write_text(json.dumps(steps))


def write_some_samples(file: Path, rounds: int, path: Path) -> None:
    """A random part of an alpaca file, the same every time: `SAMPLES_PER_ROUND` for every round.

    Raises ValueError where the file is not a JSON list of records.
    """
    records = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: a JSON list of records is needed")
    chosen = random.Random(SEED).sample(records, min(len(records), rounds * SAMPLES_PER_ROUND))
    path.write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")


def write_padded_batches(run_file: Path, path: Path) -> None:
    """The samples of a run file, encoded as fitune does, as the peer's batches in their order."""
    config = load(run_file)
    data = load_training_data(config.data, find_model(config.model).tokenizer(), config.seed)
    samples = [{"tokens": sample.tokens, "trained": sample.trained} for sample in data.train]
    starts = range(0, len(samples), PEER_BATCH_SAMPLES)
    path.write_text(json.dumps([samples[start : start + PEER_BATCH_SAMPLES] for start in starts]))


def write_run_file(
    case: Case, model: Path, data: Path, path: Path, *, compute: str, recompute: str, threads: int, rank: int = RANK
) -> None:
    """The run file of our side, as a user would write it."""
    settings = {
        "model": str(model),
        "method": "qlora",
        "seed": SEED,
        "data": {"train": str(data), "max_tokens": case.row_tokens or ROW_TOKENS, "over_length": "drop"},
        "lora": {"rank": rank, "alpha": float(ALPHA), "dropout": 0.0, "targets": "all-linear"},
        "train": {
            "micro_batch": case.rows or MICRO_BATCH,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "compute": compute,
            "recompute": recompute,
            "threads": threads,
        },
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
