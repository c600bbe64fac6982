"""Writes docs/results.md from benchmarks/results, and the table of training speed in both READMEs.

Run it after a benchmark was run with --output: python scripts/write_benchmark_docs.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import ablation  # noqa: E402
import budget_runs  # noqa: E402
import cost_curves  # noqa: E402
import generation_speed  # noqa: E402
import large_data  # noqa: E402
import larger_than_memory  # noqa: E402
import loss_agreement  # noqa: E402
import machine_limit  # noqa: E402
import paged_optimizer  # noqa: E402
import plan_accuracy  # noqa: E402
import plan_published  # noqa: E402
import train_speed  # noqa: E402
from speed_alone import Figures  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "results.md"
HEAD = """# Results

Written by `python scripts/write_benchmark_docs.py` from the files in [benchmarks/results](../benchmarks/results);
do not edit. What the scripts measure and how: [benchmarks.md](benchmarks.md). What int8 costs: [int8.md](int8.md).
"""
Found = dict[str, Any]
Table = tuple[str, Sequence[str], list[list[str]]]  # what is above it, its columns, its rows

README_MARK = re.compile(r"(<!-- train_speed\.json -->\n).*?(<!-- end -->)", re.DOTALL)
README_COLUMNS = {
    "README.md": ("case", "the peer", "fitune, bfloat16", "fitune, int8", "memory"),
    "README.zh.md": ("情形", "对方", "fitune,bfloat16", "fitune,int8", "内存"),
}
README_CASES = {
    "smollm2-4x512": ("SmolLM2-135M, 4 x 512", "SmolLM2-135M,4 x 512"),
    "llama1b-2x512": ("1.1B Llama shape, 2 x 512", "1.1B Llama 规模,2 x 512"),
    "smollm2-1x2048": ("SmolLM2-135M, 1 x 2,048", "SmolLM2-135M,1 x 2,048"),
    "llama1b-1x2048": ("1.1B Llama shape, 1 x 2,048", "1.1B Llama 规模,1 x 2,048"),
    "alpaca": (
        "SmolLM2-135M, 240 samples of an alpaca file, packed against padded batches of 4",
        "SmolLM2-135M,alpaca 文件的 240 个样本,打包对比 4 个一批的填充",
    ),
}


def _row(kind: type, found: Found) -> Any:
    """A row as its script had it."""
    return kind(**{field.name: found[field.name] for field in fields(kind) if field.name in found})


def _train_speed(result: Found) -> Iterator[Table]:
    rows = [_row(train_speed.Row, row) for row in result["rows"]]
    yield "", train_speed.COLUMNS, [train_speed.row_cells(row) for row in rows]


def _loss_agreement(result: Found) -> Iterator[Table]:
    rows = [_row(loss_agreement.Row, row) for row in result["rows"]]
    said = "; ".join(
        f"{case}, {compute}: {'within' if holds else 'outside'} the peer's own distance from float32"
        for case, verdict in result["agrees"].items()
        for compute, holds in verdict.items()
    )
    yield said + ".", loss_agreement.COLUMNS, [loss_agreement.row_cells(row) for row in rows]


def _ablation(result: Found) -> Iterator[Table]:
    rows = []
    for found in result["rows"]:
        row = _row(ablation.Row, found)
        row.figures = _row(Figures, found) if "tokens_per_second" in found else None
        rows.append(ablation.row_cells(row))
    yield f"{result['case']}, {result['compute']}; speed and memory beside everything on.", ablation.COLUMNS, rows


def _cost_curves(result: Found) -> Iterator[Table]:
    for curve, axis in cost_curves.AXES.items():
        rows = [cost_curves.row_cells(row) for row in result["rows"] if row["curve"] == curve]
        if rows:
            yield f"{result['model']}, {result['compute']}.", (axis, *cost_curves.COLUMNS), rows


def _machine_limit(result: Found) -> Iterator[Table]:
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in result["limits_per_second"].items())
    size = result["matrix_size"]
    said = f"Billions of operations a second in torch's product of two {size} x {size} matrices: {rates}."
    yield said, machine_limit.COLUMNS, [machine_limit.row_cells(row) for row in result["rows"]]


def _generation_speed(result: Found) -> Iterator[Table]:
    rows = [generation_speed.row_cells(_row(generation_speed.Row, row)) for row in result["rows"]]
    said = f"{result['model']}: {result['prompt_tokens']} tokens continued by {result['new_tokens']}."
    yield said, generation_speed.COLUMNS, rows


def _plan_accuracy(result: Found) -> Iterator[Table]:
    rows = [_row(plan_accuracy.Row, row) for row in result["rows"]]
    whole = [row for row in rows if row.problem is None]
    near = sum(abs(row.bytes_ratio - 1) <= 0.05 for row in whole)
    timely = sum(abs(row.seconds_ratio - 1) <= 0.20 for row in whole)
    said = f"Of {len(whole)} runs the planned peak of {near} is within 5 %, the planned time of {timely} within 20 %."
    yield said, plan_accuracy.COLUMNS, [plan_accuracy.row_cells(row) for row in rows]


def _larger_than_memory(result: Found) -> Iterator[Table]:
    rows = [_row(larger_than_memory.Row, row) for row in result["rows"]]
    said = "Rank 16 on all linear layers, 1 x 512 tokens a step, layers computed again in the backward pass."
    yield said, larger_than_memory.COLUMNS, [larger_than_memory.row_cells(row) for row in rows]


def _budget_runs(result: Found) -> Iterator[Table]:
    rows = [_row(budget_runs.Row, row | {"draw": budget_runs.Draw(**row["draw"])}) for row in result["rows"]]
    said = f"{sum(row.is_within for row in rows)} of {len(rows)} stayed within their budget or were refused."
    yield said, budget_runs.COLUMNS, [budget_runs.row_cells(row) for row in rows]


def _paged_optimizer(result: Found) -> Iterator[Table]:
    rows = [_row(paged_optimizer.Row, row) for row in result["rows"]]
    yield "", paged_optimizer.COLUMNS, [paged_optimizer.row_cells(row) for row in rows]


def _large_data(result: Found) -> Iterator[Table]:
    rows = [_row(large_data.Row, row) for row in result["rows"]]
    said = (
        f"{rows[0].file_bytes / 1e9:.2f} GB of JSON Lines, {result['kept_bytes'] / 1e9:.2f} GB of tokens kept. "
        "Memory of all processes together, and of the largest."
    )
    yield said, large_data.COLUMNS, [large_data.row_cells(row) for row in rows]


def _plan_published(result: Found) -> Iterator[Table]:
    rows = [_row(plan_published.Row, row) for row in result["rows"]]
    near = [row for row in rows if row.problem is None and abs(row.their_way_ratio - 1) <= 0.25]
    said = (
        "Memory of a GPU as others measured it (GB is 1e9 bytes), what fitune's plan says of the same settings, and "
        "that plan with what their tool did otherwise, which follows from its code and is not fitted. A measurement "
        "is called by its source, model, method, rows x tokens. Done their way, "
        f"{len(near)} of {len(rows)} are within 25 %."
    )
    yield said, plan_published.COLUMNS, [plan_published.row_cells(row) for row in rows]
    reasons = [[name, "; or: ".join(texts)] for name, texts in result["reasons"].items()]
    yield "What they did otherwise:", ("difference", "in words"), reasons
    sources = [
        [f"[{source['name']}]({source['url']})", _counted(source), ", ".join(_links(source["settings"])) or "there"]
        for source in result["sources"]
    ]
    yield "Where the measurements stand:", ("source", "how it was measured", "its settings"), sources


def _counted(source: Found) -> str:
    counts = {
        "allocated": "torch's tensors, so planned without the allocator's holes and the CUDA context",
        "reserved": "what torch's allocator holds, so planned without the CUDA context",
        "device": "all that is on the card",
        "not said": "what it counts is not said: planned as all that is on the card",
    }
    return f"{source['measured']}; {counts[source['counted']]}"


def _links(urls: Sequence[str]) -> list[str]:
    return [f"[{url.rstrip('/').rsplit('/', 1)[-1]}]({url})" for url in urls]


@dataclass(frozen=True)
class Section:
    """A file of results, if it is there.

    Attributes:
        environment: variables that the command was run under.
    """

    file: str
    title: str
    tables: Callable[[Found], Iterator[Table]]
    environment: str = ""


SECTIONS: tuple[Section, ...] = (
    Section("train_speed", "Training beside transformers + PEFT + bitsandbytes", _train_speed),
    Section("train_speed_shapes", "The same on other shapes", _train_speed),
    Section(
        "train_speed_recompute", "SmolLM2-135M with recomputation, and the peer under torch.compile", _train_speed
    ),
    Section("train_speed_recompute_1b", "1.1B Llama shape with recomputation", _train_speed),
    Section("train_speed_zen4", "On Zen 4: AVX-512 BF16 and VNNI, no AMX; 135M", _train_speed),
    Section("train_speed_zen4_1b", "On Zen 4: 1.1B", _train_speed),
    Section(
        "train_speed_avx512_bf16", "As without AMX, simulated on both sides", _train_speed,
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 FITUNE_INSTRUCTION_SET=avx512_bf16",
    ),
    Section(
        "train_speed_avx512", "As with AVX-512 and no bfloat16, simulated on both sides", _train_speed,
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE FITUNE_INSTRUCTION_SET=avx512",
    ),
    Section(
        "train_speed_avx2", "As with AVX2, simulated on both sides", _train_speed,
        "ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 FITUNE_INSTRUCTION_SET=avx2",
    ),
    Section("loss_agreement", "Losses beside the peer's in float32", _loss_agreement),
    Section("loss_agreement_1b", "The same of the 1.1B Llama shape", _loss_agreement),
    Section("machine_limit", "The share of the machine's limit", _machine_limit),
    Section("ablation", "What each part is worth: SmolLM2-135M", _ablation),
    Section("ablation_1b", "What each part is worth: 1.1B Llama shape", _ablation),
    Section("cost_curves", "What a step costs", _cost_curves),
    Section("generation_speed", "Generation beside transformers", _generation_speed),
    Section("plan_accuracy", "The plan beside the run", _plan_accuracy),
    Section("budget_runs", "Runs within a budget, under a hard limit", _budget_runs),
    Section("larger_than_memory", "Weights larger than memory: 7B", _larger_than_memory),
    Section("larger_than_memory_70b", "Weights larger than memory: 70B", _larger_than_memory),
    Section("paged_optimizer", "Full fine-tuning with optimizer states on disk", _paged_optimizer),
    Section("large_data", "Training data larger than memory", _large_data),
    Section("plan_published", "The plan for GPUs beside published measurements", _plan_published),
)  # fmt: skip


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    head, *lines = ["| " + " | ".join(cell or " " for cell in line) + " |" for line in (columns, *rows)]
    return "\n".join([head, "|" + "---|" * len(columns), *lines])


def results_page() -> str:
    """docs/results.md."""
    parts = [HEAD]
    for section in SECTIONS:
        path = RESULTS / f"{section.file}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = result["machine"]
        when = f"{result['date']}, " if "date" in result else ""
        parts.append(
            f"## {section.title}\n\n"
            f"[{path.name}](../benchmarks/results/{path.name}): {when}{machine['cpu']}, "
            f"{machine['threads']} threads, {machine['kernels']}, {result['seconds'] / 60:.0f} minutes.\n\n"
            f"```bash\n{' '.join(filter(None, (section.environment, result['command'])))}\n```\n"
        )
        for above, columns, rows in section.tables(result):
            parts += [above + "\n"] if above else []
            parts.append(markdown(columns, rows) + "\n")
    return "\n".join(parts)


def readme(name: str, text: str) -> str:
    """A README with the present table of training speed."""
    result = json.loads((RESULTS / "train_speed.json").read_text(encoding="utf-8"))
    rows = {(row["case"], row["compute"]): row for row in result["rows"] if not row["problem"]}
    lines = []
    for case, titles in README_CASES.items():
        ours = [rows[case, compute] for compute in ("bfloat16", "int8")]
        rates = [f"{row['tokens_per_second']:,.0f} ({row['speed_ratio']:.2f} x)" for row in ours]
        peaks = [ours[0]["peer_peak_bytes"], *(row["peak_bytes"] for row in ours)]
        title = titles[list(README_COLUMNS).index(name)]
        memory = " / ".join(f"{peak / 1e9:.2f}" for peak in peaks)
        lines.append([title, f"{ours[0]['peer_tokens_per_second']:,.0f}", *rates, memory])
    table = markdown(README_COLUMNS[name], lines)
    return README_MARK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def pages() -> dict[Path, str]:
    """Every page that this script writes, as it should be."""
    found = {PAGE: results_page()}
    for name in README_COLUMNS:
        path = REPOSITORY / name
        found[path] = readme(name, path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
