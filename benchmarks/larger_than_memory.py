"""QLoRA on weights that are larger than the memory a run may take: peak, time, and whether the bits are the same.

    python benchmarks/larger_than_memory.py [--cases NAME,...] [--json] [--rounds N] [--threads N] [--folder DIR]
                                            [--output FILE.json]

Each case is the shape of a published model whose weights are drawn at random, straight into a 4-bit checkpoint
(bitsandbytes' layout) one tensor at a time, and a run file with a memory budget. Where all of it fits into memory
too, the same run is made without a budget, and the adapters that come out must have the same bits. The runs tell the
figures themselves: the resident peak (VmHWM: anonymous and mapped memory), the median of the steps, the loss and the
gradients' norm. "Compute alone" is the plan's probe: the time of a few resident layers, times the layers.
A case whose checkpoint does not fit on the disk is left out, and says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import numpy as np
import torch
import yaml
from plan_accuracy import command, write_text
from safetensors.torch import save_file
from speed_result import Clock, add_options, check_options, folders, give_result, machine_facts, title, words
from transformers import AutoConfig

from fitune.atomic import new_folder
from fitune.cli.output import print_table
from fitune.errors import InputError
from fitune.hardware import detect, disk_free_bytes
from fitune.kernels.reference import BLOCK, NESTED_BLOCK
from fitune.models.find import find_model
from fitune.models.graph import build_graph, quantised_names
from fitune.quant.nf4 import NF4Weight
from fitune.quant.stream import layer_number

ROUNDS, WARM_STEPS = 1, 1
ROW_TOKENS, RANK, SEED = 512, 16, 0
COLUMNS = (
    "case", "budget GB", "peak GB", "resident layers", "s a step", "compute alone", "all resident", "same bits",
    "loss",
)  # fmt: skip
# What a block's largest value is decoded to: the weights then spread as a trained model's do.
ABSMAX_OFFSET, ABSMAX_SCALE = 0.03, 0.01
PLAIN_STD = 0.02
READ_BYTES = 2_000_000_000  # of the checkpoint, to tell the disk's rate

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": False}
# Meta's published configurations; the smaller one with as many rows of embeddings as the bundled tokenizer asks for.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA, "vocab_size": 49152, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    },
    "llama-3-70b": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model's shape, what a run of it may take, and whether it is also run with everything in memory."""

    shape: str
    memory: str
    also_resident: bool


CASES = {"7b": Case("llama-2-7b", "2.5GB", True), "70b": Case("llama-3-70b", "8GB", False)}


@dataclass(frozen=True)
class Row:
    """A case's figures; `problem` says why there are none.

    Attributes:
        compute_seconds: of a step with every layer in memory already, by the plan's probe.
        resident_seconds: of a step of the whole run without a budget; None: it was not made.
        same_bits: whether that run's adapter has the same ones.
        disk_bytes_per_second: reading the checkpoint once more, past the file cache.
    """

    case: str
    budget: str
    peak_bytes: int = 0
    planned_peak_bytes: int = 0
    resident_layers: int | None = None
    checkpoint_bytes: int = 0
    step_seconds: tuple[float, ...] = ()
    seconds: float = 0.0
    compute_seconds: float | None = None
    resident_seconds: float | None = None
    resident_peak_bytes: int | None = None
    same_bits: bool | None = None
    loss: float = math.nan
    grad_norm: float = math.nan
    disk_bytes_per_second: float | None = None
    problem: str | None = None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends with a usage message where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=words, default=list(CASES), metavar="A,B", help=f"of {', '.join(CASES)}")
    add_options(parser, ROUNDS, "timed steps")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases: no case called {', '.join(unknown)} (there are {', '.join(CASES)})")
    return options


def nf4_bytes(elements: int) -> int:
    """Of a weight in 4 bits."""
    blocks = -(-elements // BLOCK)
    return -(-elements // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)


class RandomCheckpoint:
    """A 4-bit checkpoint of a shape, with weights drawn at random."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        self.config = AutoConfig.for_model(**shape)
        self.graph = build_graph(self.config, torch.bfloat16)
        self.quantised = set(quantised_names(self.graph))
        self.sizes = {name: tuple(value.shape) for name, value in self.graph.named_parameters()}

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        return sum(
            nf4_bytes(math.prod(shape)) if name in self.quantised else 2 * math.prod(shape)
            for name, shape in self.sizes.items()
        )

    def write(self, folder: Path) -> None:
        """A file for each layer and one for the rest."""
        layers: dict[int, list[str]] = {}
        for name in self.sizes:
            number = layer_number(name)
            layers.setdefault(-1 if number is None else number, []).append(name)
        weight_map = {}
        for number, (_, names) in enumerate(sorted(layers.items()), start=1):
            file = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors.update(self._drawn(name))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
        index = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self._write_config(folder)
        find_model("bundled").tokenizer().save_pretrained(folder)

    def _drawn(self, name: str) -> dict[str, torch.Tensor]:
        shape, generator = self.sizes[name], np.random.Generator(np.random.SFC64([SEED, *name.encode()]))
        if name not in self.quantised:
            if "norm" in name:
                return {name: torch.ones(shape, dtype=torch.bfloat16)}
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            for row in range(0, shape[0], 4096):  # in parts: the float32 numbers would take twice the tensor
                part = drawn[row : row + 4096]
                values = generator.standard_normal(part.shape, dtype=np.float32)
                part.copy_(torch.from_numpy(values).mul_(PLAIN_STD))
            return {name: drawn}
        elements = math.prod(shape)
        blocks = -(-elements // BLOCK)
        codes = torch.frombuffer(bytearray(generator.bytes(-(-elements // 2))), dtype=torch.uint8).view(-1, 1)
        absmax = torch.frombuffer(bytearray(generator.bytes(blocks)), dtype=torch.uint8)
        nested = torch.full((-(-blocks // NESTED_BLOCK),), ABSMAX_SCALE)
        return NF4Weight(codes, absmax, nested, ABSMAX_OFFSET, shape, torch.bfloat16).serialised(name)

    def _write_config(self, folder: Path) -> None:
        linears = (name for name, module in self.graph.named_modules() if isinstance(module, torch.nn.Linear))
        config = self.config.to_dict() | {
            "architectures": [type(self.graph).__name__],
            "dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": [name for name in linears if f"{name}.weight" not in self.quantised],
            },
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))


def checkpoint(shape: str, cache: Path, say: Any) -> Path:
    """The folder of a shape's checkpoint, written now if it is not there.

    Raises InputError where the disk has no room for it.
    """
    folder = cache / f"{shape}-nf4"
    if not folder.is_dir():
        random = RandomCheckpoint(SHAPES[shape])
        free = disk_free_bytes(cache)
        if free < 1.03 * random.size_bytes:
            raise InputError(
                f"left out: {random.size_bytes / 1e9:.1f} GB of disk are needed and {free / 1e9:.1f} GB are free"
            )
        say(f"writing {random.size_bytes / 1e9:.1f} GB of weights of {shape}")
        with new_folder(folder) as beside:
            random.write(beside)
    return folder


def read_rate(folder: Path) -> float:
    """Bytes a second of reading some files of a checkpoint that the system's cache does not hold."""
    done, begun = 0, 0.0
    for path in sorted(folder.glob("model-*.safetensors"))[1:]:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while block := file.read(1 << 24):
                done += len(block)
            begun += time.perf_counter() - started
        if done > READ_BYTES:
            break
    return done / begun


def run_of(model: Path, folder: Path, memory: str | None, steps: int, threads: int | None) -> dict[str, Any]:
    """Trains, as a user would -> plan, summary, the run's settings and the steps of its metrics."""
    folder.mkdir()
    write_text(folder / "text.jsonl", 2 * steps * ROW_TOKENS)
    settings: dict[str, Any] = {
        "model": str(model), "method": "qlora", "seed": SEED,
        "data": {"train": str(folder / "text.jsonl"), "max_tokens": ROW_TOKENS, "over_length": "drop"},
        "lora": {"rank": RANK},
        "train": {"micro_batch": 1, "steps": steps, "recompute": "layers"},
    }  # fmt: skip
    if memory is not None:
        settings["memory"] = memory
    if threads:
        settings["train"]["threads"] = threads
    run_file, run = folder / "run.yaml", folder / "run"
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    command(["train", str(run_file), f"output={run}", "--json"], {**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "plan": json.loads((run / "plan.json").read_text(encoding="utf-8")),
        "summary": json.loads((run / "summary.json").read_text(encoding="utf-8")),
        "config": yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
        "steps": [line for line in lines if "loss" in line],
    }


def step_seconds(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of every step; the first one's from the run's beginning."""
    ends = [0.0, *(line["seconds"] for line in steps)]
    return [end - start for start, end in itertools.pairwise(ends)]


def measured(name: str, cache: Path, scratch: Path, rounds: int, threads: int | None, say: Any) -> Row:
    """Runs a case. Raises InputError where the disk is too small, RuntimeError with the command's own words."""
    case = CASES[name]
    model = checkpoint(case.shape, cache, say)
    steps = WARM_STEPS + rounds
    within = run_of(model, scratch / f"{name}-within", case.memory, steps, threads)
    taken = step_seconds(within["steps"])
    say(f"{name}: within {within['summary']['peak_bytes'] / 1e9:.2f} GB, steps of {taken} s")
    whole = run_of(model, scratch / f"{name}-whole", None, steps, threads) if case.also_resident else None
    last = within["steps"][-1]
    return Row(
        case=f"{name} ({case.shape})",
        budget=case.memory,
        peak_bytes=within["summary"]["peak_bytes"],
        planned_peak_bytes=within["plan"]["peak_bytes"],
        resident_layers=within["config"]["train"]["resident_layers"],
        checkpoint_bytes=sum(path.stat().st_size for path in model.iterdir()),
        step_seconds=tuple(taken),
        seconds=statistics.median(taken[WARM_STEPS:]),
        compute_seconds=within["plan"]["seconds_per_step"],
        resident_seconds=statistics.median(step_seconds(whole["steps"])[WARM_STEPS:]) if whole else None,
        resident_peak_bytes=whole["summary"]["peak_bytes"] if whole else None,
        same_bits=whole["summary"]["sha256"] == within["summary"]["sha256"] if whole else None,
        loss=last["loss"],
        grad_norm=last["grad_norm"],
        disk_bytes_per_second=read_rate(model),
    )


def row_cells(row: Row) -> list[str]:
    """A row of the table."""
    if row.problem is not None:
        return [row.case, row.budget, *["-"] * 6, row.problem.replace("\n", " ")]
    return [
        row.case, row.budget.removesuffix("GB"), f"{row.peak_bytes / 1e9:.2f}",
        "all" if row.resident_layers is None else str(row.resident_layers), f"{row.seconds:.1f}",
        "-" if row.compute_seconds is None else f"{row.compute_seconds:.1f}",
        "-" if row.resident_seconds is None else f"{row.resident_seconds:.1f}",
        "-" if row.same_bits is None else "yes" if row.same_bits else "NO", f"{row.loss:.3f}",
    ]  # fmt: skip


def main() -> int:
    options = parse()
    hardware = detect(with_accelerators=False)
    clock = Clock()
    facts = machine_facts(hardware, options.threads or hardware.threads)
    rows = []
    with folders(options.folder) as (cache, scratch):
        for name in options.cases:
            try:
                row = measured(name, cache, scratch, options.rounds, options.threads, clock.say)
            except (InputError, RuntimeError) as error:
                row = Row(name, CASES[name].memory, problem=str(error))
            rows.append(row)
            clock.say("  ".join(row_cells(row)))
            shutil.rmtree(scratch / f"{name}-within", ignore_errors=True)
    give_result([asdict(row) for row in rows], facts, clock, options)
    if not options.json:
        print(title(facts))
        print_table(COLUMNS, [row_cells(row) for row in rows])
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
