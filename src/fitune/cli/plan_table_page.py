"""The table of methods against sizes of memory, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fitune.cli.output import gigabytes, print_json, print_table

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig
    from fitune.models.source import ModelSource
    from fitune.plan.fit_table import Cell, FitTable

HEADS = {"gpu": "GPU", "cpu": "CPU"}


def run_table(source: ModelSource, run: RunConfig, as_json: bool) -> None:
    """Makes the table and prints it."""
    from fitune.plan.fit_table import fit_table

    table = fit_table(run, source.reference, source.config)
    if as_json:
        print_json({**table.as_dict(), "note": source.note, "warnings": source.warnings()})
        return
    print_fit_table(table)
    if source.note:
        print(f"Note: {source.note}.")


def print_fit_table(table: FitTable) -> None:
    """A block for GPUs and one for CPUs; what was taken for the run, and how it was found."""
    rows_to = f"rows up to {table.lengths[-1]:,}"
    print(f"Longest row that fits, in tokens, for {table.model} ({rows_to}); or what is missing\n")
    for kind, head in HEADS.items():
        cells = [cell for cell in table.cells if cell.kind == kind]
        sizes = sorted({cell.memory_bytes for cell in cells})
        methods = list(dict.fromkeys((cell.method, cell.optimizer) for cell in cells))
        found = {(cell.method, cell.optimizer, cell.memory_bytes): _entry(cell) for cell in cells}
        rows = [
            [_name(method, optimizer), *(found[method, optimizer, size] for size in sizes)]
            for method, optimizer in methods
        ]
        print_table([head, *(f"{size / 1e9:g} GB" for size in sizes)], rows)
        print()
    layers = "layers computed again" if table.recompute == "layers" else "layers kept: the model cannot do otherwise"
    print(
        f"One row a micro-batch, one document a row, half of it trained; {layers}; adapters of rank {table.rank} on "
        "all linear layers.\n"
        f"Dry-run at {', '.join(f'{tokens:,}' for tokens in table.dry_run_tokens)} tokens, straight lines between "
        "and beyond. 1 GB is 1e9 bytes; fitune plan --on NAME knows what a card really has."
    )


def _name(method: str, optimizer: str) -> str:
    return f"{method}, 8-bit AdamW" if optimizer == "adamw8bit" else method


def _entry(cell: Cell) -> str:
    return f"{cell.longest_tokens:,}" if cell.longest_tokens else f"-{gigabytes(cell.missing_bytes)}"
