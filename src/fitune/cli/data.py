"""`fitune data`: what a file of training data holds, in another format, in parts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig
    from fitune.data.dataset import TrainingData

group = typer.Typer(help="Inspect, convert and split training data.", no_args_is_help=True)

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", metavar="FOUND=WANTED", help="Rename a column; a path such as answers[0].text too."),
]
Found = Annotated[str, typer.Option("--format", help="How the records are written; auto recognises it.")]
Instruction = Annotated[str, typer.Option(help="For records of questions and answers that have no instruction.")]


class Target(StrEnum):
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    messages = "messages"
    prompt_completion = "prompt_completion"
    question_answer = "question_answer"
    text = "text"
    preference = "preference"
    kto = "kto"


class OverLength(StrEnum):
    error = "error"
    drop = "drop"
    cut = "cut"
    parts = "split"


class TrainOn(StrEnum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    all = "all"


@group.command("inspect")
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Data files, or one run file (.yaml).")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and chat template; without it the run file's, or bundled.")
    ] = None,
    found: Found = "auto",
    columns: Columns = None,
    instruction: Instruction = "",
    validation: Annotated[
        str | None, typer.Option(metavar="FILE|SHARE", help="Validation data, or the share to hold out.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=16, help="Length of a row.")] = None,
    over_length: Annotated[OverLength | None, typer.Option(help="What to do with samples longer than a row.")] = None,
    train_on: Annotated[TrainOn | None, typer.Option(help="Whose tokens are learnt.")] = None,
    with_time: Annotated[
        bool, typer.Option("--time/--no-time", help="Estimate the time of an epoch, by a probe of some seconds.")
    ] = True,
    html: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what would be trained on, token by token, and what is wrong with it; exit code 2 where it cannot be."""
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"--html {html}: there is no folder {html.absolute().parent} to write it in")
    from fitune.cli.encoding_view import encoding
    from fitune.data.dataset import examine_data
    from fitune.models.find import find_model
    from fitune.models.positions import check_positions

    given = {
        "max_tokens": max_tokens,
        "over_length": over_length.value if over_length else None,
        "train_on": train_on.value if train_on else None,
    }
    data: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if validation is not None:
        data["validation"] = _share(validation)
    config = _run_of(files, found, _columns(columns), instruction, data, model)
    source = find_model(config.model)
    check_positions(config.data.max_tokens, source.config, config.model)
    with encoding() as watch:
        objective = config.train.objective if config.model_fields_set & {"train"} else None
        examined = examine_data(config.data, source.tokenizer(), config.seed, watch, objective)
    report = examined.data.report
    seconds, why = _epoch_seconds(config, examined.data) if with_time and not report.refused else (None, None)
    if html is not None:
        from fitune.atomic import write_text
        from fitune.cli.data_report_page import data_report_page

        write_text(html, data_report_page(report, config.model, seconds))
    if as_json:
        from fitune.cli.output import print_json

        print_json({"model": config.model, **report.as_json(), "seconds_per_epoch": seconds, "no_time_because": why})
    else:
        from rich.console import Console

        Console(highlight=False).print(report.as_rich())
        if seconds is not None:
            from fitune.train.progress_view import clock

            print(f"\nAn epoch takes about {clock(seconds)} on this machine ({config.method}).")
        elif why is not None:
            print(f"\nHow long an epoch takes could not be estimated: {why}")
    if report.refused:
        raise typer.Exit(2)


@group.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="The data file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; its suffix says how.")],
    to: Annotated[Target, typer.Option("--to", help="The format to write.")] = Target.messages,
    found: Found = "auto",
    columns: Columns = None,
    instruction: Instruction = "",
    answers: Annotated[
        Path | None, typer.Option(help="A second text file, line by line the answers to FILE's lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write a data file's samples in another format, and lose nothing of them."""
    from dataclasses import asdict

    from fitune.cli.output import print_json
    from fitune.data.format_conversion import convert_file

    done = convert_file(source, target, to.value, found, _columns(columns), instruction, answers)
    if as_json:
        print_json(asdict(done))
    else:
        print(f"{done.samples:,} samples: {done.source} ({done.found}) -> {done.target} ({done.format})")


@group.command("split")
def split(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="The data file.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make, with a file for every part.")],
    validation: Annotated[float, typer.Option(help="Share of the samples for validation; 0: none.")] = 0.05,
    test: Annotated[float, typer.Option(help="Share of the samples for the test; 0: none.")] = 0.0,
    by: Annotated[
        str | None, typer.Option("--group", metavar="KEY", help="Samples with the same value stay in one part.")
    ] = None,
    stratify: Annotated[
        str | None, typer.Option(metavar="KEY", help="Every value has its share in every part.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other parts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Split a data file for training, validation and test; samples that say the same never part."""
    from dataclasses import asdict

    from fitune.cli.output import print_json
    from fitune.data.splitting import split_file

    shares = {name: share for name, share in (("validation", validation), ("test", test)) if share != 0}
    done = split_file(source, folder, shares, seed, by, stratify)
    if as_json:
        print_json(asdict(done))
        return
    for part, file in done.files.items():
        print(f"{part:<10}  {done.samples[part]:>9,} samples  {file}")
    print(f"{done.duplicates:,} samples say the same as an earlier one; each lies in its part.")
    if by is not None:
        print(f"{done.groups:,} values of {by}, none of them in two parts.")


class PromptStyle(StrEnum):
    compact = "compact"
    create = "create"
    list = "list"


@group.command("sql")
def sql(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="A file as Spider's train.json or BIRD's.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file of conversations to write.")],
    databases: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the SQLite files are.")] = None,
    tables: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Spider's or BIRD's tables.json: schemas with descriptions.")
    ] = None,
    style: Annotated[PromptStyle, typer.Option(help="How schemas are written.")] = PromptStyle.compact,
    values: Annotated[int, typer.Option(min=0, max=20, help="So many values of each column in the prompt.")] = 0,
    max_schema_tokens: Annotated[
        int | None, typer.Option(min=16, help="Leave out tables that the question does not need, above so many.")
    ] = None,
    model: Annotated[str, typer.Option(help="Whose tokens are counted.")] = "bundled",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run every query; leave out what fails.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Make text-to-SQL conversations of questions, queries and databases; what does not run is listed."""
    if databases is None and tables is None:
        raise InputError("name the folder of the SQLite files (--databases), a tables.json (--tables), or both")
    if values and (databases is None or style is PromptStyle.compact):
        raise InputError("--values needs --databases, and --style create or list")
    if target.exists():
        raise InputError("there is such a file already; name another, or remove it", where=target)
    from fitune.cli.output import print_json
    from fitune.data.record_writing import record_of, write_records, written_kind
    from fitune.data.schema_files import read_schema_file
    from fitune.data.sql_questions import find_databases, make_lessons, read_questions
    from fitune.evaluate.sql_execution import run_for_check
    from fitune.models.find import find_model

    written_kind(target)
    tokenizer = find_model(model).tokenizer() if max_schema_tokens else None
    lessons = make_lessons(
        read_questions(questions),
        find_databases(databases) if databases else {},
        read_schema_file(tables) if tables else {},
        run_for_check if check else None,
        style.value,
        values,
        max_schema_tokens,
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else 0,
    )
    if not lessons.samples:
        raise InputError([f"{origin}: {sentence}" for origin, sentence in lessons.problems[:20]], where=questions)
    write_records(target, (record_of(sample, "messages") for sample in lessons.samples))
    facts = {
        "samples": len(lessons.samples),
        "databases": len(lessons.databases),
        "left_out": lessons.left_out,
        "cut": lessons.cut,
        "unchecked": lessons.unchecked,
        "problems": [
            {"file": origin.path, "line": origin.line, "message": sentence} for origin, sentence in lessons.problems
        ],
    }
    if as_json:
        print_json({"target": target, **facts})
        return
    for origin, sentence in lessons.problems[:20]:
        print(f"{origin}: {sentence}")
    if len(lessons.problems) > 20:
        print(f"and {len(lessons.problems) - 20} more")
    print(
        f"{facts['samples']:,} conversations on {facts['databases']:,} databases -> {target}; {lessons.left_out:,} "
        f"questions left out, {lessons.cut:,} schemas cut"
    )
    if lessons.unchecked:
        print(f"{lessons.unchecked:,} queries were not run: their databases are not there")


def _columns(given: list[str] | None) -> dict[str, str]:
    columns = {}
    for entry in given or []:
        found, mark, wanted = entry.partition("=")
        if not mark or not found or not wanted:
            raise InputError(f"--columns {entry}: write FOUND=WANTED, such as question=instruction")
        columns[found] = wanted
    return columns


def _share(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _run_of(
    files: list[str], found: str, columns: dict[str, str], instruction: str, data: dict[str, Any], model: str | None
) -> RunConfig:
    """The run file's settings, or those of a run on these files, with the options in their place."""
    from pydantic import ValidationError

    from fitune.config.run_file import load
    from fitune.config.schema import RunConfig

    if any(Path(file).suffix.lower() in (".yaml", ".yml") for file in files):
        if len(files) > 1 or found != "auto" or columns or instruction:
            raise InputError("a run file says itself what its data are: give it alone")
        overrides = [f"data.{name}={value}" for name, value in data.items()]
        return load(Path(files[0]), [*overrides, *([f"model={model}"] if model else [])])
    how = {"format": found, "columns": columns, "instruction": instruction or None}
    sources = [{"path": file, **how} for file in files]
    try:
        return RunConfig.model_validate({"model": model or "bundled", "data": {"train": sources, **data}})
    except ValidationError as error:
        raise InputError([_sentence(found) for found in error.errors()]) from None


def _sentence(found: Any) -> str:
    """One of pydantic's errors, in our words where they are ours."""
    own = found.get("ctx", {}).get("error")
    return str(own) if own is not None else f"{'.'.join(map(str, found['loc']))}: {found['msg']}"


def _epoch_seconds(config: RunConfig, data: TrainingData) -> tuple[float | None, str | None]:
    """Of a run on this machine, or why nobody can say."""
    from fitune.errors import FituneError
    from fitune.train.run import plan_run, prepare_run

    train = config.train.model_copy(update={"epochs": 1.0, "steps": None})
    try:
        return plan_run(prepare_run(config.model_copy(update={"train": train}), data=data)).seconds, None
    except FituneError as error:
        return None, str(error)
