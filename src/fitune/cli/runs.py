"""`fitune runs`: which runs there are, what one of them was, and how two differ."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fitune.train.run_list import RunFacts

group = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
COLUMNS = ("run", "model", "method", "state", "steps", "loss", "validation", "began")


@group.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, and below.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, the oldest first."""
    from fitune.cli.output import print_json, print_table
    from fitune.train.run_list import find_runs

    runs = find_runs(folder)
    if as_json:
        print_json({"runs": [_brief(run) for run in runs]})
    elif runs:
        print_table(COLUMNS, [_cells(run) for run in runs])
    else:
        print(f"There are no runs in {folder}.")


@group.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show what a run was trained on, how, where, and what came out."""
    from fitune.cli.output import gigabytes, print_facts, print_json
    from fitune.train.progress_view import clock
    from fitune.train.run_list import read_run
    from fitune.train.scoring import score_in_words

    found = read_run(run)
    if as_json:
        print_json(found.as_json())
        return
    summary, config = found.summary, found.config
    lines = {
        "state": found.state + ("" if found.state != "stopped" else f"; go on with: fitune train {run} --resume"),
        "model": str(config.get("model")),
        "method": str(config.get("method")),
        "steps": _of(found),
        "loss": _number(found.loss),
        "validation loss": _number(found.validation_loss),
        "checkpoints": ", ".join(found.checkpoints) or "none",
    }
    if found.score is not None:
        lines["score"] = f"{score_in_words(found.score)} after step {found.score['step']:,}"
    for file in summary.get("data", {}).get("files", []):
        lines[f"data {file['path']}"] = f"{file['samples']:,} samples, format {file['format']}"
    if summary:
        machine = summary["machine"]
        lines |= {
            "time": clock(summary["seconds"]),
            "peak memory": f"{gigabytes(summary['peak_bytes'])} (planned {gigabytes(summary['planned_peak_bytes'])})",
            "base": f"{summary['base']['reference']} (weights {summary['base']['identity']})",
            "machine": f"{machine['processor']}, {machine['threads']} threads",
            "versions": ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
            "result": f"sha256 {summary['sha256']}",
        }
    for name, values in found.evaluation.items():
        if isinstance(values, dict):
            plain = {part: value for part, value in values.items() if not isinstance(value, dict | list)}
            lines |= {f"{name} {part}": _value(value) for part, value in plain.items()}
    print_facts(str(run), lines)


@group.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one's.")],
    as_json: AsJson = False,
) -> None:
    """Show in what two runs differ: settings, data, machine, results."""
    from fitune.cli.output import print_json, print_table
    from fitune.train.run_list import differences, read_run

    found = differences(read_run(one), read_run(other))
    if as_json:
        print_json({part: {name: list(values) for name, values in rows.items()} for part, rows in found.items()})
        return
    rows = [
        (part, name, _value(values[0]), _value(values[1]))
        for part, parts in found.items()
        for name, values in parts.items()
    ]
    if rows:
        print_table(("of", "what", str(one), str(other)), rows)
    else:
        print("They do not differ.")


def _brief(run: RunFacts) -> dict[str, Any]:
    return {
        "run": str(run.path), "model": run.config.get("model"), "method": run.config.get("method"),
        "state": run.state, "steps": run.steps, "of_steps": run.of_steps, "loss": run.loss,
        "validation_loss": run.validation_loss, "began": run.began,
    }  # fmt: skip


def _cells(run: RunFacts) -> tuple[str, ...]:
    began = datetime.fromtimestamp(run.began).strftime("%Y-%m-%d %H:%M")
    return (
        str(run.path), Path(str(run.config.get("model"))).name, str(run.config.get("method")), run.state, _of(run),
        _number(run.loss), _number(run.validation_loss), began,
    )  # fmt: skip


def _of(run: RunFacts) -> str:
    return f"{run.steps:,}" if run.of_steps in (None, run.steps) else f"{run.steps:,} of {run.of_steps:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
