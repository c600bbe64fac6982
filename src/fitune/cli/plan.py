"""`fitune plan`: what a run will take, before it runs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.config.schema import RunConfig
    from fitune.models.source import ModelSource
    from fitune.plan.levers import Choice
    from fitune.plan.machines import Machine
    from fitune.plan.planner import Plan, Workload

# The workload that is planned for where only a model is named.
SAMPLES, SAMPLE_TOKENS, TRAINED_SHARE = 1000, 256, 0.5
ASSUMED = f"Assumed, as no run file was given: {SAMPLES:,} samples of {SAMPLE_TOKENS} tokens, half of them trained."
ASSUMED_WITH_STEPS = f"Assumed, as no run file was given: samples of {SAMPLE_TOKENS} tokens, half of them trained."
ASSUMED_OF_PRESET = f"{ASSUMED_WITH_STEPS} How long the run takes follows from your data, or from train.steps=N."
# What the table goes through, or sets to what takes the least.
CHOSEN_BY_TABLE = {
    "method", "memory", "data.max_tokens", "train.micro_batch", "train.accumulation", "train.recompute",
    "train.optimizer",
}  # fmt: skip


def command(
    run: Annotated[
        str, typer.Argument(metavar="RUN.yaml|MODEL", help="A run file, a model's name, or a preset's (llama-2-13b).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Settings instead of the file's.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="CARD|cpu:SIZE", help="For another machine: rtx3090, a100-80gb, cpu:64GB, ..."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="For a GPU of this memory: 24GB, 11.9GiB.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", help="With --on or --memory: so many of them.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Which method fits in which memory, with rows of which length.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show how much memory and time a run will take, whether it fits, and what was decided and why."""
    from fitune.cli.output import print_json, print_warnings
    from fitune.cli.plan_page import print_plan

    machine = _machine(on, memory, count)
    if table:
        from fitune.cli.plan_table_page import run_table

        if machine is not None:
            raise InputError("is over many machines; leave --on, --memory and --count out", where="--table")
        chosen = [name for word in overrides or [] if (name := word.partition("=")[0].strip()) in CHOSEN_BY_TABLE]
        if chosen:
            raise InputError(f"chooses {', '.join(chosen)} itself; leave it out", where="--table")
        run_table(*_opened(run, overrides or []), as_json)
        return
    if machine is not None:
        _plan_elsewhere(run, overrides or [], machine, as_json)
        return
    if is_run_file(run):
        from fitune import config
        from fitune.cli.encoding_view import encoding
        from fitune.train.run import plan_run, prepare_run

        with encoding() as watch:
            prepared = prepare_run(config.load(Path(run), overrides or ()), watch=watch)
        assumed, note, warnings = None, None, prepared.source.warnings()
        print_warnings(warnings)
        plan = plan_run(prepared)
    else:
        from fitune.models.presets import open_to_plan

        source = open_to_plan(run)
        note, warnings = source.note, source.warnings()
        print_warnings(warnings)
        plan, assumed = _plan_model(source, run, overrides or [])
    if as_json:
        print_json({**plan.as_dict(), "assumed": assumed, "note": note, "warnings": warnings})
        return
    print_plan(plan)
    if assumed:
        print(f"\n{assumed}" + (f"\nNote: {note}." if note else ""))
    else:
        print(f"\nNext: fitune train {' '.join([run, *(overrides or [])])}")


def _machine(on: str | None, memory: str | None, count: int | None) -> Machine | None:
    """The machine that is named; None: this one."""
    if on is None and memory is None and count is None:
        return None
    from fitune.plan.machines import find_machine

    return find_machine(on, memory, 1 if count is None else count)


def _opened(run: str, overrides: list[str]) -> tuple[ModelSource, RunConfig]:
    """The model and the settings of a run file, or of a bare model; nothing else of either is read."""
    from fitune.cli.output import print_warnings
    from fitune.models.presets import open_to_plan

    if is_run_file(run):
        from fitune import config

        settings = config.load(Path(run), overrides)
    else:
        settings = _settings_for(run, overrides)
    source = open_to_plan(settings.model)
    print_warnings(source.warnings())
    return source, settings


def _plan_elsewhere(run: str, overrides: list[str], machine: Machine, as_json: bool) -> None:
    """The plan for a machine that is not this one, and what would fit there where it does not."""
    from fitune.cli.output import print_warnings
    from fitune.cli.plan_elsewhere_page import show_elsewhere
    from fitune.plan.budget import is_wanted
    from fitune.plan.chosen_elsewhere import choose_for
    from fitune.plan.elsewhere import plan_for
    from fitune.train.loop import learning_rate

    assumed = None
    if is_run_file(run):
        from fitune import config
        from fitune.cli.encoding_view import encoding
        from fitune.train.run import prepare_run, workload_of

        with encoding() as watch:
            prepared = prepare_run(config.load(Path(run), overrides), choose=False, watch=watch)
        settings, source = prepared.config, prepared.source
        print_warnings(source.warnings())

        def workload(chosen: RunConfig) -> Workload:
            return workload_of(prepared, chosen)
    else:
        source, settings = _opened(run, overrides)
        assumed = _workload(source, settings)[1]

        def workload(chosen: RunConfig) -> Workload:
            return _workload(source, chosen)[0]

    choices: tuple[Choice, ...] = ()
    budget = None
    if is_wanted(settings):
        fitted = choose_for(settings, source.config, machine, workload)
        settings, choices, budget = fitted.run, fitted.choices, fitted.budget_bytes
    work = workload(settings)
    facts = (source.reference, source.config, machine, work, learning_rate(settings))
    plan = plan_for(settings, *facts, choices, budget)
    show_elsewhere(plan, settings, source, machine, work, assumed, as_json)


def is_run_file(words: str) -> bool:
    """Whether this names a run file and not a model."""
    path = Path(words)
    return path.suffix.lower() in (".yaml", ".yml") or (path.is_file() and path.suffix.lower() != ".gguf")


def _plan_model(source: ModelSource, model: str, overrides: list[str]) -> tuple[Plan, str]:
    """The plan, and what had to be assumed for it."""
    from fitune.hardware import detect
    from fitune.plan.budget import is_wanted, plan_within
    from fitune.plan.computation import choose_computation
    from fitune.plan.planner import make_plan
    from fitune.train.loop import learning_rate

    config = _settings_for(model, overrides)
    hardware = detect()
    computation = choose_computation(config, hardware)
    computation.begin()
    facts = (source.reference, source.config, computation, hardware)
    if is_wanted(config):
        config, plan = plan_within(config, *facts, lambda run: _workload(source, run)[0], learning_rate)
    else:
        plan = make_plan(config, *facts, _workload(source, config)[0], learning_rate(config))
    return plan, _workload(source, config)[1]


def _workload(source: ModelSource, config: RunConfig) -> tuple[Workload, str]:
    """What is taken for the data where only a model is named, and the sentence that says so."""
    from fitune.plan.planner import Workload

    train, tokens = config.train, SAMPLES * SAMPLE_TOKENS
    step_tokens = config.data.max_tokens * train.micro_batch * train.accumulation
    # Who plans for a preset has neither weights nor data yet: a length would be invented.
    steps = train.steps or (0 if source.kind == "preset" else -(-round(tokens * train.epochs) // step_tokens))
    workload = Workload(steps, steps * step_tokens, SAMPLE_TOKENS, TRAINED_SHARE, config.data.max_tokens)
    return workload, ASSUMED if source.kind != "preset" else ASSUMED_OF_PRESET if not steps else ASSUMED_WITH_STEPS


def _settings_for(model: str, overrides: list[str]) -> RunConfig:
    """Defaults and overrides, read as strictly as a run file."""
    from fitune import config

    with tempfile.TemporaryDirectory(prefix="fitune-plan-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("data:\n  train: run.yaml\n")  # named, never read
        try:
            return config.load(path, overrides).model_copy(update={"model": model})
        except InputError as error:
            raise InputError(error.problems, where="settings") from None
