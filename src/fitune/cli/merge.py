"""`fitune merge`: a run's adapter into its 16-bit base, proven before it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fitune.errors import InputError


def command(
    run: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run's folder, or an adapter's.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; without it RUN/merged.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Merge an adapter into its 16-bit base, load the result anew and compare its logits."""
    from transformers.utils.logging import disable_progress_bar

    from fitune.cli.output import gigabytes, print_facts, print_json, print_warnings
    from fitune.export.merging import merge_adapter
    from fitune.train.trained_model import find_trained

    disable_progress_bar()
    found = find_trained(run, four_bit=False)
    if found.adapter is None:
        what = "was fully fine-tuned: its model folder is whole" if found.run is not None else "has no adapter"
        raise InputError(f"{what}; there is nothing to merge", where=run)
    print_warnings(found.source.warnings())
    folder = output or (found.run.path if found.run else found.adapter) / "merged"
    print(f"merging into {folder}", file=sys.stderr, flush=True)
    report = merge_adapter(found.source, found.adapter, folder, overwrite=overwrite)
    compared = report.comparison
    if as_json:
        print_json(
            {
                "output": folder,
                "files": report.files,
                "weight_bytes": report.weight_bytes,
                "tensors": report.tensors,
                "merged_tensors": report.merged_tensors,
                "tokenizer_from": report.tokenizer_from,
                "rounding_error": compared.rounding_error,
                "rounding_tolerance": compared.rounding_tolerance,
                "merge_error": compared.merge_error,
                "merge_tolerance": compared.merge_tolerance,
                "adapter_effect": compared.adapter_effect,
                "compared_tokens": compared.tokens,
                "compute": compared.compute,
                "note": report.note,
            }
        )
        return
    lines = {
        "folder": str(folder),
        "weights": f"{gigabytes(report.weight_bytes)} in {len(report.files)} files, {report.tensors} tensors, "
        f"{report.merged_tensors} of them changed",
        "tokenizer": f"the {report.tokenizer_from}'s",
        "checked": f"loaded anew; its logits over {compared.tokens} tokens differ from base + adapter by "
        f"{compared.rounding_error:.1e} (allowed {compared.rounding_tolerance:.1e}; rounding to 16 bits), from "
        f"PEFT's own merge by {compared.merge_error:.1e} (allowed {compared.merge_tolerance:.1e}); the adapter "
        f"itself changes them by {compared.adapter_effect:.1e}",
    }
    if report.note:
        lines["note"] = report.note
    print_facts("Merged", lines)
    print(f"\nNext:\n  fitune chat {folder}")
