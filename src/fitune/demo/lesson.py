"""The main job on the bundled default: teach a real model text-to-SQL on a real database, and prove it learnt."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fitune.atomic import write_text
from fitune.config.schema import DataSettings, DataSource, EvaluateSettings, LoraSettings, RunConfig, TrainSettings
from fitune.data.reading import read_samples
from fitune.data.text_to_sql import read_schema, serialise_schema, sql_messages
from fitune.demo.database import build_demo_database
from fitune.demo.questions import DisjointReport, Question, QuestionSets, check_disjoint, generate_questions
from fitune.errors import InputError
from fitune.evaluate.task_evaluation import TaskEvaluation, correct_of, evaluate_task
from fitune.fuse.model import FusedModel
from fitune.generate.generation import GenerationStats
from fitune.generate.stopping import stop_ids
from fitune.models.store import Progress as StoreProgress
from fitune.plan.planner import Plan
from fitune.process_memory import peak_bytes
from fitune.train.loop import Watcher
from fitune.train.run import Outcome, Prepared, plan_run, prepare_run, train_run
from fitune.train.run_folder import RunFolder

# Longer than any gold query (50 tokens on the demo database).
MAX_ANSWER_TOKENS = 64
ANSWER_BATCH = 64  # questions answered at once: their keys and values take 0.34 GB
SCORE = "execution_accuracy"
SETS = ("values", "phrasings")


@dataclass(frozen=True)
class Size:
    """How much is asked, learnt and tested.

    Attributes:
        forms: which forms of question (None: all).
        base_questions: of each held-out set that the untuned model answers, for the comparison (None: all).
    """

    train_questions: int
    held_out: int
    epochs: float
    forms: tuple[str, ...] | None
    base_questions: int | None


# docs/log.md has the runs that these come from.
FULL = Size(train_questions=3450, held_out=320, epochs=1.0, forms=None, base_questions=None)
QUICK = Size(
    train_questions=720,
    held_out=40,
    epochs=1.0,
    forms=(
        "column",
        "equals",
        "greater",
        "less",
        "count_rows",
        "count_equals",
        "average",
        "largest",
        "smallest",
        "top_n",
        "group_count",
        "join_filter",
    ),
    base_questions=20,
)
LEARNING_RATE = 1.5e-3
BETAS = (0.9, 0.98)  # a second moment over some fifty steps: a run has a few hundred
ROW_TOKENS = 512


@dataclass(frozen=True)
class Quickstart:
    """Everything a quickstart found out. The sets are `values` and `phrasings`."""

    database: Path
    questions: QuestionSets
    disjoint: DisjointReport
    prepared: Prepared
    outcome: Outcome
    base: dict[str, TaskEvaluation]
    tuned: dict[str, TaskEvaluation]
    seconds: float
    peak_bytes: int

    @property
    def accuracy(self) -> dict[str, float]:
        """Execution accuracy: of the base on all it was asked, of the tuned model on each set."""
        base = [right for evaluation in self.base.values() for right in correct_of(evaluation)]
        return {
            "base": sum(base) / len(base),
            **{f"tuned_{name}": found.scores[SCORE].value for name, found in self.tuned.items()},
        }


@dataclass(frozen=True)
class Screen:
    """How a quickstart speaks: one line, the plan, the training's progress, the store's."""

    say: Callable[[str], None]
    show_plan: Callable[[Plan], None]
    training: Callable[[Prepared, Plan], AbstractContextManager[Watcher]] | None = None
    store_progress: StoreProgress | None = None
    answering: Callable[[str, int, int], None] | None = None


def run_quickstart(
    folder: Path, size: Size, screen: Screen, database: Path | None = None, seed: int = 0
) -> Quickstart:
    """Builds the data, plans, trains and evaluates in `folder`, which must not hold a run yet.

    `database` is the user's own SQLite file (None: the demo's, built in the folder).

    Raises InputError for a database that cannot be used, or a folder that is taken.
    """
    started = time.perf_counter()
    if folder.exists() and any(folder.iterdir()):
        raise InputError("the folder is not empty; give another one", where=folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        own = database if database is not None else _demo_database(folder)
        schema = serialise_schema(read_schema(own))
        sets = generate_questions(
            own, seed=seed, train_size=size.train_questions, held_out_size=size.held_out, forms=_known_forms(size)
        )
        disjoint = check_disjoint(sets)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    screen.say(f"database: {database or 'a shop of seven tables that comes with fitune'}")
    screen.say(str(disjoint))
    for form, reason in sets.skipped.items():
        screen.say(f"form left out: {form}: {reason}")
    for note in sets.notes:
        screen.say(note)
    held_out = {"values": sets.unseen_values, "phrasings": sets.unseen_phrasings}
    _write_questions(folder / "train.jsonl", schema, sets.train)
    for name, questions in held_out.items():
        _write_questions(_held_out_file(folder, name), schema, questions)

    prepared = prepare_run(_config(folder, size, own, seed))
    if prepared.source.note:
        screen.say(prepared.source.note)
    plan = plan_run(prepared)
    screen.show_plan(plan)
    base: dict[str, TaskEvaluation] = {}
    with nullcontext() if screen.training is None else screen.training(prepared, plan) as watch:
        outcome = train_run(
            prepared, plan, RunFolder(folder), watch=watch, store_progress=screen.store_progress, say=screen.say,
            before=lambda model: base.update(_ask(prepared, model, folder, size.base_questions, "before", screen)),
        )  # fmt: skip
    tuned = _ask(prepared, outcome.model, folder, None, "after", screen)
    return Quickstart(
        own, sets, disjoint, prepared, outcome, base, tuned, time.perf_counter() - started, peak_bytes()
    )  # fmt: skip


def _ask(
    prepared: Prepared, model: FusedModel, folder: Path, limit: int | None, when: str, screen: Screen
) -> dict[str, TaskEvaluation]:
    """The model's execution accuracy on each held-out set (its first `limit` questions)."""
    found = {}
    tokenizer, settings = prepared.source.tokenizer(), prepared.config.evaluate
    for name in SETS:
        samples = read_samples(_held_out_file(folder, name))[:limit]

        def progress(stats: GenerationStats, what: str = f"{when}, unseen {name}", total: int = len(samples)) -> None:
            if screen.answering is not None:
                screen.answering(what, stats.prompts_done, total)

        found[name] = evaluate_task(
            model, tokenizer, samples, "sql", eos_ids=stop_ids(prepared.source, tokenizer),
            database=Path(str(settings.database)), max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch, on_progress=progress,
        )  # fmt: skip
    return found


def _held_out_file(folder: Path, name: str) -> Path:
    return folder / f"unseen_{name}.jsonl"


def _known_forms(size: Size) -> list[str] | None:
    return None if size.forms is None else list(size.forms)


def _demo_database(folder: Path) -> Path:
    path = folder / "shop.sqlite"
    build_demo_database(path)
    return path


def _write_questions(path: Path, schema: str, questions: Sequence[Question]) -> None:
    lines = []
    for question in questions:
        messages = [
            {"role": message.role, "content": message.content}
            for message in sql_messages(schema, question.question, question.sql)
        ]
        lines.append(json.dumps({"messages": messages, "form": question.form}, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def _config(folder: Path, size: Size, database: Path, seed: int) -> RunConfig:
    place = folder.resolve()
    return RunConfig(
        model="bundled",
        method="qlora",
        output=str(place),
        seed=seed,
        data=DataSettings(train=(DataSource(path=str(place / "train.jsonl")),), max_tokens=ROW_TOKENS),
        lora=LoraSettings(rank=16, alpha=32),
        train=TrainSettings(
            epochs=size.epochs, micro_batch=1, learning_rate=LEARNING_RATE, betas=BETAS, save_every_steps=100
        ),
        evaluate=EvaluateSettings(
            task="sql", data=str(_held_out_file(place, "values")), database=str(database.resolve()),
            max_new_tokens=MAX_ANSWER_TOKENS, batch=ANSWER_BATCH,
        ),
    )  # fmt: skip


def default_quickstart_folder() -> Path:
    """runs/quickstart-TIME."""
    return Path("runs") / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
