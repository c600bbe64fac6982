"""The peak memory of making a store: a sharded checkpoint of Llama 2 7B's shape, quantised in a fresh process.

    python benchmarks/store_memory.py [--json] [--layers N] [--folder DIR] [--threads N]

Writes a random bfloat16 checkpoint (0.40 GB a layer, 0.52 GB for embedding and head) into a temporary folder, lets
another process make its store there, and reads that process's memory from /proc every few milliseconds: what it
allocated itself (RssAnon) and what it mapped of files (RssFile: page cache, which the system takes back when it
needs it). "Above" is what was added after everything was imported. Both folders are deleted at the end. The folder
must lie on a real disk: files of a tmpfs are memory themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPE = {  # arXiv 2307.09288 and the published config.json of Llama 2 7B
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYERS_PER_SHARD = 4
SAMPLE_SECONDS = 0.003
FIELDS = ("VmRSS", "RssAnon", "RssFile")

# The measured process. It says when it is about to begin, and at the end how long it took.
MAKING = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from fitune.kernels import native
from fitune.models.find import find_model
from fitune.models.graph import build_graph
from fitune.models.store import open_store
source = find_model(sys.argv[1])
build_graph(source.config, torch.bfloat16)  # imports the model's own module
backend = "native" if native.status().available else "reference"
print("ready", flush=True)
input()
start = time.perf_counter()
store = open_store(source, backend)
print(time.perf_counter() - start, sum(entry["bytes"] for entry in store.manifest["files"].values()), backend)
"""


def tensors_of_layer(number: int) -> dict[str, tuple[int, ...]]:
    hidden, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    start = f"model.layers.{number}"
    shapes: dict[str, tuple[int, ...]] = {f"{start}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
    shapes |= {f"{start}.mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
    shapes[f"{start}.mlp.down_proj.weight"] = (hidden, wide)
    return shapes | {f"{start}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}


def write_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """-> bytes of all tensors, bytes of the largest. The tensors are cut from one piece of noise."""
    ends = {"model.embed_tokens.weight": (SHAPE["vocab_size"], SHAPE["hidden_size"]),
            "model.norm.weight": (SHAPE["hidden_size"],),
            "lm_head.weight": (SHAPE["vocab_size"], SHAPE["hidden_size"])}  # fmt: skip
    groups = [range(start, min(layers, start + LAYERS_PER_SHARD)) for start in range(0, layers, LAYERS_PER_SHARD)]
    shards = [{name: shape for layer in group for name, shape in tensors_of_layer(layer).items()} for group in groups]
    shards[0] = {"model.embed_tokens.weight": ends.pop("model.embed_tokens.weight")} | shards[0]
    shards[-1] |= ends
    room = SHAPE["vocab_size"] * SHAPE["hidden_size"] + 4096
    noise = torch.empty(room, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    weight_map, total, largest = {}, 0, 0
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for place, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            tensors[name] = noise[place : place + count].view(shape)
            total, largest = total + 2 * count, max(largest, 2 * count)
        # safetensors refuses tensors that share memory unless they are told apart
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    return total, largest


def memory(process: int) -> dict[str, int]:
    """Resident bytes of a process; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split()[:2] for line in lines if line.split(":")[0] in FIELDS)
    return {field.rstrip(":"): int(kilobytes) * 1024 for field, kilobytes in pairs}


def measure(model: Path, cache: Path, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "FITUNE_CACHE": str(cache), "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen(
        [sys.executable, "-c", MAKING, str(model), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    if child.stdout.readline().strip() != "ready":
        raise SystemExit(f"the measured process failed with {child.wait()}")
    before = memory(child.pid)
    peak = dict(before)
    child.stdin.write("\n")
    child.stdin.flush()
    while child.poll() is None:
        for field, found in memory(child.pid).items():
            peak[field] = max(peak[field], found)
        time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        raise SystemExit(f"the measured process failed with {child.returncode}")
    seconds, store_bytes, backend = child.stdout.read().split()
    return {"before": before, "peak": peak, "above": {field: peak[field] - before[field] for field in FIELDS},
            "seconds": float(seconds), "store_bytes": int(store_bytes), "backend": backend}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 32 is the whole model (default 8)")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room (default: the system's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="store-memory-", dir=options.folder) as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        total, largest = write_checkpoint(folder / "model", options.layers)
        found = measure(folder / "model", folder / "cache", options.threads)
    result = {
        "layers": options.layers,
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "threads": options.threads,
        **found,
        "largest_tensors_above": {field: found["above"][field] / largest for field in FIELDS},
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"{options.layers} layers of Llama 2 7B: {total / 1e9:.2f} GB in bfloat16, its store "
        f"{found['store_bytes'] / 1e9:.2f} GB, made in {found['seconds']:.1f} s ({found['backend']}); "
        f"the largest tensor has {largest / 1e6:.0f} MB"
    )
    print(f"{'':>28} {'before':>9} {'peak':>9} {'above':>9}  largest tensors")
    words = {"RssAnon": "allocated (RssAnon)", "RssFile": "mapped files (RssFile)", "VmRSS": "together (VmRSS)"}
    for field, what in words.items():
        numbers = [f"{found[key][field] / 1e6:>6,.0f} MB" for key in ("before", "peak", "above")]
        print(f"{what:>28} {' '.join(numbers)}  {found['above'][field] / largest:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
