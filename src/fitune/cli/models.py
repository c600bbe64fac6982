"""`fitune models`: what a model is, and which quantised copies lie in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

group = typer.Typer(help="Show what a model is, and the stores of quantised weights; audit model types.")


@group.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    audit: Annotated[
        bool, typer.Option("--audit", help="Check every model type of transformers on a tiny random model of it.")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,NAME", help="With --audit: these types.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="With --audit: write the page; exit code 1 if a row got worse."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --audit: print one JSON object.")] = False,
) -> None:
    """Show what a model is, and the stores of quantised weights; audit model types."""
    from fitune.errors import InputError

    if context.invoked_subcommand is not None:
        if audit or only or write or as_json:
            raise InputError("--audit, --only, --write and --json before a command go together with no command")
        return
    if not audit:
        if only or write or as_json:
            raise InputError("--only, --write and --json go with --audit")
        print(context.get_help())
        return
    from fitune.cli.audit_page import run_audit_verb

    if not run_audit_verb(only, write, as_json):
        raise typer.Exit(1)


@group.command("show")
def show(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="bundled, a folder, a GGUF file, a hub name or a preset; none: list."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show a model's dimensions, weights in 16 and 4 bits, place, chat template and recommended settings."""
    if model is None:
        list_presets(as_json)
        return
    from fitune.cli.models_page import model_facts, print_model
    from fitune.cli.output import print_json, print_warnings
    from fitune.models.presets import open_to_plan

    facts = model_facts(model, open_to_plan(model))
    print_warnings(facts["warnings"])
    if as_json:
        print_json(facts)
    else:
        print_model(facts)


@group.command("list")
def list_presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the models whose dimensions are known without a download (presets)."""
    from fitune.cli.models_page import preset_rows, print_presets
    from fitune.cli.output import print_json

    rows = preset_rows()
    if as_json:
        print_json({"presets": rows})
    else:
        print_presets(rows)


@group.command("stores")
def stores(
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every byte with what was written; exit code 1 where one differs."),
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete those that are damaged, or whose model is gone or has changed.")
    ] = False,
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
    problems = _verify([entry.folder for entry in found if entry.state != "unfinished"]) if verify else {}
    states = {entry.folder: "damaged" if problems.get(entry.folder) else entry.state for entry in found}
    deleted: list[Path] = []
    if prune:
        deleted = [
            entry.folder for entry in found
            if everything or entry.is_stale or states[entry.folder] == "damaged"
        ]  # fmt: skip
        for folder in deleted:
            delete_store(folder)
    if as_json:
        print_json(
            {
                "folder": cache_folder() / "stores",
                "stores": [
                    {"folder": entry.folder, "model": entry.model, "bytes": entry.size_bytes, "made": entry.made,
                     "state": states[entry.folder], "deleted": entry.folder in deleted,
                     "problems": problems.get(entry.folder)}
                    for entry in found
                ],
            }
        )  # fmt: skip
    elif not found:
        print(f"No stores in {cache_folder() / 'stores'}.")
    else:
        rows = [
            (entry.model, gigabytes(entry.size_bytes), f"{entry.made:%Y-%m-%d %H:%M}",
             "deleted" if entry.folder in deleted else states[entry.folder], str(entry.folder))
            for entry in found
        ]  # fmt: skip
        print_table(("model", "size", "made", "state", "folder"), rows)
        _print_problems(problems)
    if any(problems.values()):
        raise typer.Exit(1)


def _verify(folders: list[Path]) -> dict[Path, list[str]]:
    """Each store's problems, none for one that is as it was written; a bar on a terminal's stderr meanwhile."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from fitune.models.store_check import verify_store

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    problems: dict[Path, list[str]] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        for folder in folders:
            bar = bars.add_task(folder.name, total=None)

            def show(done: int, total: int, bar: TaskID = bar) -> None:
                bars.update(bar, completed=done, total=total)

            problems[folder] = verify_store(folder, show)
            bars.remove_task(bar)
    return problems


def _print_problems(problems: dict[Path, list[str]]) -> None:
    for folder, sentences in problems.items():
        print(f"\n{folder}: {'as it was written' if not sentences else 'damaged'}")
        for sentence in sentences:
            print(f"  {sentence}")
    if any(problems.values()):
        print("\n`fitune models stores --verify --prune` deletes the damaged ones; they are made again when needed.")
