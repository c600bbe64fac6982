"""`fitune quickstart`: teach the bundled model text-to-SQL, and prove that it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    db: Annotated[
        Path | None,
        typer.Option("--db", help="Your own SQLite database; without it the shop that comes with fitune."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer forms and questions: a gain to see in a minute or two.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run folder (new, or empty).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the questions and of training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")] = False,
) -> None:
    """Teach a small real model text-to-SQL on a real database, and measure what it learnt.

    Everything is offline: the model and the database come with the installation. Before training, after it, and on
    questions that were never trained, the model's SQL is run and its result compared with the right one.
    """
    from fitune.cli.output import print_json
    from fitune.cli.quickstart_page import ConsoleScreen
    from fitune.demo.lesson import FULL, QUICK, default_quickstart_folder, run_quickstart
    from fitune.demo.lesson_report import as_json as result_as_json
    from fitune.demo.lesson_report import write_html

    page = ConsoleScreen(to_stderr=as_json)
    found = run_quickstart(output or default_quickstart_folder(), QUICK if quick else FULL, page.screen(), db, seed)
    write_html(found)
    page.show_result(found)
    if as_json:
        print_json(result_as_json(found))
