"""Products with frozen NF4 weights and their adapters: 8-bit integers against bfloat16, both native.

    python benchmarks/int8_product_speed.py [--json] [--rank 16] [--seconds 1.0] [--case NAME]

The layer groups of product_speed.py, forward and the gradient of the input, with scales for blocks of 256 and for the
whole depth, and forward with 32 outlier columns as well. All take turns in short bursts; medians. An operation is a
multiplication or an addition of the frozen product and the adapters. Other instruction sets: FITUNE_INSTRUCTION_SET.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch
from product_speed import GROUPS, Group, alternate

from fitune.hardware import detect
from fitune.kernels import int8_products, native
from fitune.quant import nf4

ROWS = (512, 2048)
OUTLIERS = 32
# how -> values that share a scale (0: the whole depth), outlier columns
VARIANTS = {"256": (256, 0), "256+32": (256, OUTLIERS), "whole": (0, 0), "whole+32": (0, OUTLIERS)}


class Int8Group(Group):
    """The same operands with what integers need beside them."""

    def __init__(self, depth: int, widths: list[int], rows: int, rank: int) -> None:
        super().__init__(depth, widths, rows, rank)
        parts = [(*self.frozen[4 * i : 4 * i + 3], self.offsets[i], width, depth) for i, width in enumerate(widths)]
        table = nf4.DYNAMIC_MAP
        self.scales = [int8_products.int8_row_scales(*part, table, "native") for part in parts]
        self.outliers = torch.arange(OUTLIERS, dtype=torch.int32) * (depth // OUTLIERS)
        self.columns = [int8_products.int8_outlier_columns(*part, self.outliers, table, "native") for part in parts]

    def integer_calls(self, direction: str) -> dict[str, Callable[[], object]]:
        """Of each variant its product in this direction."""
        table = nf4.DYNAMIC_MAP
        if direction == "backward":
            return {
                name: lambda block=block: int8_products.int8_product_backward(
                    self.grads,
                    self.frozen,
                    self.offsets,
                    self.scales,
                    self.depth,
                    self.factors,
                    table,
                    block,
                    "native",
                )
                for name, (block, outliers) in VARIANTS.items()
                if not outliers
            }
        return {
            name: lambda block=block, outliers=outliers: int8_products.int8_product(
                self.x, self.frozen, self.offsets, self.scales, self.columns, self.outliers[:outliers]
                if outliers else self.outliers[:0], self.factors, table, block, "native",
            )
            for name, (block, outliers) in VARIANTS.items()
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a row (default 1)")
    parser.add_argument("--case", choices=list(GROUPS), help="only this model's shapes")
    options = parser.parse_args()
    rows = []
    for model in [options.case] if options.case else GROUPS:
        for tokens in ROWS:
            for name, (depth, widths) in GROUPS[model].items():
                group = Int8Group(depth, widths, tokens, options.rank)
                for direction in ("forward", "backward"):
                    calls = {"bf16": group.calls(torchs=False)[direction], **group.integer_calls(direction)}
                    seconds = dict(zip(calls, alternate(list(calls.values()), options.seconds), strict=True))
                    rows.append(
                        {"model": model, "tokens": tokens, "group": name, "pass": direction,
                         "operations": group.operations[direction], "seconds": seconds}
                    )  # fmt: skip
    result = {
        "cpu": detect(with_accelerators=False).cpu_model,
        "threads": torch.get_num_threads(),
        "instruction_set": native.status().instruction_set,
        "rank": options.rank,
        "torch": torch.__version__,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['cpu']}, {result['threads']} threads, {result['instruction_set']}, rank {options.rank}; GOP/s")
    print(f"{'shapes':>18} {'pass':>9} {'bf16':>7} " + " ".join(f"{name:>16}" for name in VARIANTS))
    for row in rows:
        rate = {name: row["operations"] / seconds / 1e9 for name, seconds in row["seconds"].items()}
        base = rate["bf16"]
        cells = [f"{rate[name]:>8.0f} ({rate[name] / base:.2f}x)" if name in rate else "" for name in VARIANTS]
        print(
            f"{row['model'] + ' ' + str(row['tokens']) + ' ' + row['group']:>18} {row['pass']:>9} {base:>7.0f} "
            + " ".join(f"{cell:>16}" for cell in cells)
        )
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        for direction in ("forward", "backward"):
            some = [r["seconds"] for r in rows if (r["model"], r["tokens"], r["pass"]) == (model, tokens, direction)]
            total = {name: sum(seconds[name] for seconds in some) * 1e3 for name in some[0]}
            shown = ", ".join(f"{name} {ms:.2f} ({total['bf16'] / ms:.2f}x)" for name, ms in total.items())
            print(f"{model} {tokens} {direction}: one layer, ms: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
