"""Products with frozen NF4 weights and their adapters: native kernels against decoding and torch's own products.

    python benchmarks/product_speed.py [--json] [--rank 16] [--seconds 1.0] [--case NAME] [--few]

One layer group at a time (q, k, v in one call; gate and up in one call; the output and down projections), forward,
the gradient of the input, and the gradients of the adapters. "torch" decodes NF4 with fitune's native kernel, then
multiplies in bfloat16 (oneDNN) and adds the adapter's parts. Both take turns in short bursts; medians. An operation
is a multiplication or an addition; the adapters' count too. The other instruction sets: FITUNE_INSTRUCTION_SET.

--few: what generation does for every token, the forward products of 1 to 64 rows through all layers and the output
head, so that every weight comes from memory anew: NF4 and dense bfloat16 weights with adapters (rank 0: without),
beside torch.mm on dense weights alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fitune.hardware import detect
from fitune.kernels import native, products
from fitune.quant import nf4

# name -> depth, widths; of SmolLM2-135M and of a 1.1B Llama
GROUPS = {
    "135M": {"qkv": (576, [576, 192, 192]), "o": (576, [576]), "gate+up": (576, [1536, 1536]), "down": (1536, [576])},
    "1.1B": {"qkv": (2048, [2048, 256, 256]), "o": (2048, [2048]), "gate+up": (2048, [5632, 5632]),
             "down": (5632, [2048])},
}  # fmt: skip
ROWS = {"135M": (512, 2048), "1.1B": (1024, 2048)}
FEW_ROWS = (1, 4, 16, 32, 64)
LAYERS = {"135M": (30, 30), "1.1B": (22, 4)}  # how many there are, and how many are made (1 GB)
HEADS = {"135M": (576, 49152), "1.1B": (2048, 32000)}
PASSES = ("forward", "backward", "adapters")


class Group:
    """The operands of one layer group."""

    def __init__(self, depth: int, widths: list[int], rows: int, rank: int) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).mul_(0.05).to(torch.bfloat16)

        stored = [nf4.quantise(random(width, depth), "native") for width in widths]
        self.frozen = [t for one in stored for t in (one.codes, one.absmax, one.nested_absmax, None)]
        self.offsets = [one.offset for one in stored]
        self.depth, self.widths = depth, widths
        self.factors: list[Tensor | None] = [None] * (2 * len(widths))
        if rank:
            self.factors = [factor for width in widths for factor in (random(rank, depth), random(width, rank))]
        self.x = random(rows, depth)
        self.grads = [random(rows, width) for width in widths]
        self.us = [random(rows, rank) for _ in widths]
        self.operations = {
            "forward": 2 * rows * sum(depth * width + rank * (depth + width) for width in widths),
            "adapters": 2 * rows * sum(rank * (depth + width) for width in widths),
        }
        self.operations["backward"] = self.operations["forward"]

    def calls(self, torchs: bool) -> dict[str, Callable[[], object]]:
        """The three passes; `torchs`: with torch's products."""
        operators = products.products_reference if torchs else products
        last = "native"  # torch's: what decodes; ours: the backend
        table = nf4.DYNAMIC_MAP

        def adapters() -> object:
            scalings = [1.0] * len(self.widths)
            return operators.adapter_gradients(self.grads, self.x, self.us, self.us, scalings, last)

        return {
            "forward": lambda: operators.frozen_product(
                self.x, self.frozen, self.offsets, self.widths, self.factors, table, last
            ),
            "backward": lambda: (
                operators.frozen_product_backward(
                    self.grads, self.frozen, self.offsets, self.depth, self.factors, table, last
                )
                if not torchs
                else self._torch_backward(operators, table, last)
            ),
            "adapters": adapters,
        }

    def _torch_backward(self, operators: Any, table: Tensor, decoder: str) -> object:
        """As the fused modules do it: the first product makes the gradient, the others are added to it."""
        weight = operators.dense(
            self.frozen, 0, self.offsets[0], [self.widths[0], self.depth], torch.bfloat16, table, decoder
        )
        into = torch.mm(self.grads[0], weight)
        del weight
        into.addmm_(torch.mm(self.grads[0], self.factors[1]), self.factors[0])
        if len(self.grads) > 1:
            operators.frozen_product_backward_(
                self.grads[1:], self.frozen[4:], self.offsets[1:], into, self.factors[2:], table, decoder
            )
        return into


def alternate(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each, taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def few_rows(model: str, rank: int, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds a token of each number of rows: the products of all layers, and of the output head."""
    draw = torch.Generator().manual_seed(1)
    count, made = LAYERS[model]
    shapes = {"layers": list(GROUPS[model].values()) * made, "head": [(HEADS[model][0], [HEADS[model][1]])]}
    rows: list[dict[str, Any]] = []
    for part, groups in shapes.items():
        layers = []
        for depth, widths in groups:
            group = Group(depth, widths, 0, rank if part == "layers" else 0)
            weights = [torch.randn(width, depth, generator=draw).mul_(0.05).to(torch.bfloat16) for width in widths]
            dense = [tensor for weight in weights for tensor in (weight, None, None, None)]
            layers.append((group, dense, weights))
        for tokens in FEW_ROWS:
            xs = {depth: torch.randn(tokens, depth, generator=draw).to(torch.bfloat16) for depth, _ in groups}

            def ours(four_bits: bool, layers: Any = layers, xs: Any = xs) -> None:
                for group, dense, _ in layers:
                    frozen = group.frozen if four_bits else dense
                    products.frozen_product(
                        xs[group.depth], frozen, group.offsets, group.widths, group.factors, nf4.DYNAMIC_MAP, "native"
                    )

            def torchs(layers: Any = layers, xs: Any = xs) -> None:
                for group, _, weights in layers:
                    for weight in weights:
                        torch.mm(xs[group.depth], weight.t())

            calls: list[Callable[[], object]] = [partial(ours, True), partial(ours, False), torchs]
            scale = 1e3 * (count / made if part == "layers" else 1)
            nf4_ms, dense_ms, torch_ms = (scale * found for found in alternate(calls, seconds))
            rows.append(
                {"model": model, "part": part, "rows": tokens, "nf4_ms": nf4_ms, "dense_ms": dense_ms,
                 "torch_dense_ms": torch_ms}
            )  # fmt: skip
    return rows


def print_few(rows: list[dict[str, Any]]) -> None:
    print(f"{'ms a token':>18} {'rows':>5} {'NF4':>8} {'dense':>8} {'torch.mm, dense':>16}")
    for row in rows:
        print(
            f"{row['model'] + ' ' + row['part']:>18} {row['rows']:>5} {row['nf4_ms']:>8.2f} {row['dense_ms']:>8.2f} "
            f"{row['torch_dense_ms']:>16.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a figure (default 1)")
    parser.add_argument("--case", choices=list(GROUPS), help="only this model's shapes")
    parser.add_argument("--few", action="store_true", help="the products of 1 to 64 rows that generation makes")
    options = parser.parse_args()
    state = native.status()
    rows: list[dict[str, Any]] = []
    for model in [options.case] if options.case else GROUPS:
        if options.few:
            rows += few_rows(model, options.rank, options.seconds)
            continue
        for tokens in ROWS[model]:
            for name, (depth, widths) in GROUPS[model].items():
                group = Group(depth, widths, tokens, options.rank)
                ours, theirs = group.calls(torchs=False), group.calls(torchs=True)
                for part in PASSES:
                    own, other = alternate([ours[part], theirs[part]], options.seconds)
                    operations = group.operations[part]
                    rows.append(
                        {
                            "model": model, "tokens": tokens, "group": name, "pass": part,
                            "native_ms": own * 1e3, "torch_ms": other * 1e3,
                            "native_gflops": operations / own / 1e9, "torch_gflops": operations / other / 1e9,
                        }
                    )  # fmt: skip
    result = {
        "cpu": detect(with_accelerators=False).cpu_model,
        "threads": torch.get_num_threads(),
        "instruction_set": state.instruction_set,
        "native_products": products.natively_multiplied(torch.bfloat16),
        "rank": options.rank,
        "torch": torch.__version__,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['cpu']}, {result['threads']} threads, {state.instruction_set}, rank {options.rank}")
    if options.few:
        print_few(rows)
        return 0
    print(f"{'shapes':>18} {'pass':>9} {'native ms':>10} {'torch ms':>10} {'GFLOP/s':>9} {'torch':>7} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['model'] + ' ' + str(row['tokens']) + ' ' + row['group']:>18} {row['pass']:>9} "
            f"{row['native_ms']:>10.3f} {row['torch_ms']:>10.3f} {row['native_gflops']:>9.0f} "
            f"{row['torch_gflops']:>7.0f} {row['torch_ms'] / row['native_ms']:>6.2f}"
        )
    for model in {row["model"]: None for row in rows}:
        for tokens in ROWS[model]:
            some = [row for row in rows if row["model"] == model and row["tokens"] == tokens]
            own, other = (sum(row[f"{who}_ms"] for row in some) for who in ("native", "torch"))
            print(f"{model} {tokens}: one layer {own:.2f} ms, with torch {other:.2f} ms, ratio {other / own:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
