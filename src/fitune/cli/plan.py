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
    from fitune.plan.planner import Plan

# The workload that is planned for where only a model is named.
SAMPLES, SAMPLE_TOKENS, TRAINED_SHARE = 1000, 256, 0.5
ASSUMED = f"Assumed, as no run file was given: {SAMPLES:,} samples of {SAMPLE_TOKENS} tokens, half of them trained."
ASSUMED_WITH_STEPS = f"Assumed, as no run file was given: samples of {SAMPLE_TOKENS} tokens, half of them trained."
ASSUMED_OF_PRESET = f"{ASSUMED_WITH_STEPS} How long the run takes follows from your data, or from train.steps=N."


def command(
    run: Annotated[
        str, typer.Argument(metavar="RUN.yaml|MODEL", help="A run file, a model's name, or a preset's (llama-2-13b).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Settings instead of the file's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show how much memory and time a run will take, whether it fits, and what was decided and why."""
    from fitune.cli.output import print_json, print_warnings
    from fitune.cli.plan_page import print_plan

    if is_run_file(run):
        from fitune import config
        from fitune.train.run import plan_run, prepare_run

        prepared = prepare_run(config.load(Path(run), overrides or ()))
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


def is_run_file(words: str) -> bool:
    """Whether this names a run file and not a model."""
    path = Path(words)
    return path.suffix.lower() in (".yaml", ".yml") or (path.is_file() and path.suffix.lower() != ".gguf")


def _plan_model(source: ModelSource, model: str, overrides: list[str]) -> tuple[Plan, str]:
    """The plan, and what had to be assumed for it."""
    from fitune.hardware import detect
    from fitune.plan.budget import is_wanted, plan_within
    from fitune.plan.computation import choose_computation
    from fitune.plan.planner import Workload, make_plan
    from fitune.train.loop import learning_rate

    config = _settings_for(model, overrides)
    hardware = detect()
    computation = choose_computation(config, hardware)
    computation.begin()
    is_preset = source.kind == "preset"

    def workload(run: RunConfig) -> Workload:
        step_tokens = run.data.max_tokens * run.train.micro_batch * run.train.accumulation
        # Who plans for a preset has neither weights nor data yet: a length would be invented.
        whole = -(-round(SAMPLES * SAMPLE_TOKENS * run.train.epochs) // step_tokens)
        steps = run.train.steps or (0 if is_preset else whole)
        return Workload(steps, steps * step_tokens, SAMPLE_TOKENS, TRAINED_SHARE, run.data.max_tokens)

    facts = (source.reference, source.config, computation, hardware)
    if is_wanted(config):
        config, plan = plan_within(config, *facts, workload, learning_rate)
    else:
        plan = make_plan(config, *facts, workload(config), learning_rate(config))
    has_steps = bool(workload(config).steps)
    return plan, ASSUMED if not is_preset else ASSUMED_WITH_STEPS if has_steps else ASSUMED_OF_PRESET


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
