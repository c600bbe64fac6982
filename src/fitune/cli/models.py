"""`fitune models`: what a model is, and which quantised copies lie in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

group = typer.Typer(help="Show what a model is, and the stores of quantised weights.", no_args_is_help=True)


@group.command("show")
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="bundled, a folder, a GGUF file or a hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show a model's architecture, size, place, note and chat template."""
    from math import prod

    from fitune.cli.output import print_facts, print_json
    from fitune.models.find import find_model

    source = find_model(model)
    config = source.config
    names = source.tensor_names()
    kinds = sorted({str(source.dtype(name)).removeprefix("torch.") for name in names})
    facts = {
        "model": model,
        "kind": source.kind,
        "architecture": config.model_type,
        "parameters": sum(prod(source.shape(name)) for name in names),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context_tokens": getattr(config, "max_position_embeddings", None),
        "dtype": ", ".join(kinds),
        "has_chat_template": bool(source.tokenizer().chat_template),
        "files": source.files(),
        "bytes": sum(path.stat().st_size for path in source.files()),
        "note": source.note,
    }
    if as_json:
        print_json(facts)
        return
    lines = {
        "architecture": f"{facts['architecture']}, {facts['layers']} layers, hidden size {facts['hidden_size']:,}",
        "parameters": f"{facts['parameters']:,} ({facts['dtype']})",
        "vocabulary": f"{facts['vocabulary']:,} tokens",
        "context": f"{facts['context_tokens']:,} tokens" if facts["context_tokens"] else "without a fixed bound",
        "chat template": "its own" if facts["has_chat_template"] else "none; the default one is used",
        "lies in": str(source.files()[0].parent),
    }
    if source.note:
        lines["note"] = source.note
    print_facts(f"{model} ({source.kind})", lines)


@group.command("stores")
def stores(
    prune: Annotated[bool, typer.Option("--prune", help="Delete those whose model is gone or has changed.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --prune: delete all of them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the stores of quantised weights: model, size, when, and whether the model is still there."""
    from fitune.cli.output import gigabytes, print_json, print_table
    from fitune.errors import InputError
    from fitune.models.cache import cache_folder
    from fitune.models.store_list import delete_store, list_stores

    if everything and not prune:
        raise InputError("--all goes with --prune")
    found = list_stores()
    deleted: list[Path] = []
    if prune:
        deleted = [entry.folder for entry in found if everything or entry.state in ("gone", "changed", "unfinished")]
        for folder in deleted:
            delete_store(folder)
    if as_json:
        print_json(
            {
                "folder": cache_folder() / "stores",
                "stores": [
                    {"folder": entry.folder, "model": entry.model, "bytes": entry.size_bytes, "made": entry.made,
                     "state": entry.state, "deleted": entry.folder in deleted}
                    for entry in found
                ],
            }
        )  # fmt: skip
        return
    if not found:
        print(f"No stores in {cache_folder() / 'stores'}.")
        return
    rows = [
        (entry.model, gigabytes(entry.size_bytes), f"{entry.made:%Y-%m-%d %H:%M}",
         "deleted" if entry.folder in deleted else entry.state, str(entry.folder))
        for entry in found
    ]  # fmt: skip
    print_table(("model", "size", "made", "state", "folder"), rows)
