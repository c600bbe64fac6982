"""What training in int8 costs in quality: losses of the bundled model on text-to-SQL, beside bfloat16's.

    python benchmarks/int8_quality.py SPIDER_FOLDER [--steps N] [--seeds N] [--every N] [--variants A,B] [--rate R]
                                      [--questions N] [--threads N] --output FILE.json

SPIDER_FOLDER holds the Spider data set as it was published: train_spider_syn.json, dev.json, tables.json, and
database/ for `--questions`. Each run begins with the same adapter and sees the same rows of tokens; only the format
of the products with frozen weights differs in training. The loss on rows of dev.json, whose databases no run has
seen, is computed in bfloat16 for all of them. With `--questions` so many questions of dev.json are answered at the
end, and their queries executed.

The file is written after every run; runs that it already holds are not taken again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch

from fitune.atomic import write_text
from fitune.config.schema import RunConfig
from fitune.data.conversation import Message, Sample
from fitune.data.encoding import EncodedSample, encode
from fitune.evaluate.task_evaluation import correct_of, evaluate_task
from fitune.fuse.int8_calibration import calibrate
from fitune.fuse.model import FusedModel
from fitune.generate.stopping import stop_ids
from fitune.hardware import detect
from fitune.models.find import find_model
from fitune.plan.computation import choose_computation
from fitune.step.optimizer import make_optimizer
from fitune.step.schedule import Schedule
from fitune.step.update import update
from fitune.train.loop import Rows, validate
from fitune.train.prepare import build_for_training
from fitune.train.run import machine

ROW_TOKENS, HELD_OUT_ROWS = 512, 12
EMPTY_DATABASES = ("wta_1",)  # without rows every query is right
# How the frozen products of a training step are computed: in integers in the forward pass, in the backward pass.
VARIANTS = {"bfloat16": None, "int8": (True, True), "int8 backward": (False, True), "int8 forward": (True, False)}


def schemas(folder: Path) -> dict[str, str]:
    """The tables of each database, a line each."""
    found = {}
    for database in json.loads((folder / "tables.json").read_text(encoding="utf-8")):
        columns: list[list[str]] = [[] for _ in database["table_names_original"]]
        for table, column in database["column_names_original"]:
            if table >= 0:
                columns[table].append(column)
        pairs = zip(database["table_names_original"], columns, strict=True)
        found[database["db_id"]] = "\n".join(f"{name}({', '.join(inside)})" for name, inside in pairs)
    return found


def samples_of(entries: Sequence[dict[str, Any]], question: str, tables: dict[str, str]) -> list[Sample]:
    """Schema and question in, query out."""
    return [
        Sample(
            (
                Message("user", f"{tables[entry['db_id']]}\n\n{entry[question]}"),
                Message("assistant", " ".join(entry["query"].split())),
            ),
            extra={"database": entry["db_id"]},
        )
        for entry in entries
    ]


def that_fit(samples: Sequence[Sample], tokenizer: Any) -> list[EncodedSample]:
    """Encoded, those that are longer than a row left out."""
    encoded = [encode(sample, tokenizer, "assistant", None) for sample in samples]
    return [sample for sample in encoded if len(sample) <= ROW_TOKENS]


def rows_of(samples: Sequence[EncodedSample], seed: int) -> Rows:
    return Rows(samples, ROW_TOKENS, 1, 1, seed, True, 0, share=False)


def held_out_samples(samples: Sequence[EncodedSample]) -> list[EncodedSample]:
    """Every n-th sample, as many as fill some rows."""
    step = max(1, sum(map(len, samples)) // (HELD_OUT_ROWS * ROW_TOKENS))
    return list(samples[::step])


def build(config: RunConfig, variant: str, rows: Rows) -> FusedModel:
    source = find_model("bundled")
    narrow = config.model_copy(update={"train": config.train.model_copy(update={"compute": "bfloat16"})})
    model = build_for_training(narrow, source, choose_computation(narrow, detect()))
    passes = VARIANTS[variant]
    if passes is not None:
        calibrate(model, rows.first_batches(), forward=passes[0], backward=passes[1])
    return model


def train(
    config: RunConfig, variant: str, rows: Rows, held_out: Sequence[EncodedSample], every: int
) -> tuple[FusedModel, dict[str, Any]]:
    """One run -> the model, and its losses."""
    settings = config.train
    assert settings.steps is not None
    assert settings.learning_rate is not None
    torch.manual_seed(config.seed)
    model = build(config, variant, rows)
    optimizer = make_optimizer(
        settings.optimizer, model.trainable, settings.betas, settings.weight_decay, model.backend
    )
    schedule = Schedule(settings.schedule, settings.learning_rate, settings.steps, settings.warmup_share)
    losses, validation, seconds = [], [(0, validate(model, held_out, rows).loss)], 0.0
    for number, (_, step_rows) in enumerate(rows.steps(settings.epochs, settings.steps)):
        begun = time.perf_counter()
        result = update(model, rows.batches(step_rows), optimizer, schedule.rate(number), settings.max_grad_norm)
        seconds += time.perf_counter() - begun
        losses.append(result.loss)
        if (number + 1) % every == 0 or number + 1 == settings.steps:
            validation.append((number + 1, validate(model, held_out, rows).loss))
            mean = statistics.fmean(losses[-every:])
            said = f"{variant}, seed {config.seed}, step {number + 1}: held-out {validation[-1][1]:.4f}"
            pace = f"last training losses {mean:.4f}, {seconds / (number + 1):.2f} s a step"
            print(f"{said}, {pace}", file=sys.stderr, flush=True)
    return model, {"losses": losses, "held_out": validation, "seconds": seconds}


def execution_accuracy(model: FusedModel, samples: Sequence[Sample], folder: Path) -> dict[str, int]:
    """How many of the samples' questions are answered right."""
    source = find_model("bundled")
    tokenizer = source.tokenizer()
    right = 0
    for name in sorted({sample.extra["database"] for sample in samples}):
        chosen = [sample for sample in samples if sample.extra["database"] == name]
        path = folder / "database" / name / f"{name}.sqlite"
        found = evaluate_task(model, tokenizer, chosen, "sql", eos_ids=stop_ids(source, tokenizer), database=path)
        right += sum(correct_of(found))
    return {"right": right, "questions": len(samples)}


def compared(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant the last held-out loss over the seeds, its distance from bfloat16's, and its answers."""
    lines = []
    reference = {run["seed"]: run["held_out"][-1][1] for run in runs if run["variant"] == "bfloat16"}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        last = {run["seed"]: run["held_out"][-1][1] for run in runs if run["variant"] == variant}
        shared = [seed for seed in last if seed in reference]
        apart = [last[seed] / reference[seed] - 1 for seed in shared]
        answers = [run["execution"] for run in runs if run["variant"] == variant and "execution" in run]
        lines.append({
            "variant": variant, "seeds": sorted(last), "held_out_loss": statistics.fmean(last.values()),
            "above_bfloat16": statistics.fmean(apart) if apart else None, "above_bfloat16_of_each_seed": apart,
            "right": sum(one["right"] for one in answers), "questions": sum(one["questions"] for one in answers),
        })  # fmt: skip
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spider", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--variants", default="bfloat16,int8")
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    variants = options.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))} (there are {', '.join(VARIANTS)})")

    tables = schemas(options.spider)
    tokenizer = find_model("bundled").tokenizer()
    trained = json.loads((options.spider / "train_spider_syn.json").read_text(encoding="utf-8"))
    unseen = json.loads((options.spider / "dev.json").read_text(encoding="utf-8"))
    training = that_fit(samples_of(trained, "SpiderQuestion", tables), tokenizer)
    questions = samples_of([one for one in unseen if one["db_id"] not in EMPTY_DATABASES], "question", tables)
    held_out = held_out_samples(that_fit(questions, tokenizer))
    asked = (
        questions[:: max(1, len(questions) // options.questions)][: options.questions] if options.questions else []
    )
    facts = {
        "settings": {"steps": options.steps, "learning_rate": options.rate, "row_tokens": ROW_TOKENS, "rank": 16,
                     "training_samples": len(training), "held_out_samples": len(held_out)},
        "machine": machine(detect()), "command": "python " + " ".join(sys.argv),
    }  # fmt: skip
    runs: list[dict[str, Any]] = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    for seed in range(options.seeds):
        for variant in variants:
            if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
                continue
            settings = {"steps": options.steps, "learning_rate": options.rate, "threads": options.threads}
            config = RunConfig.model_validate({"data": {"train": ["none"]}, "seed": seed, "train": settings})
            choose_computation(config, detect()).begin()
            model, found = train(config, variant, rows_of(training, seed), held_out, options.every)
            if asked:
                found["execution"] = execution_accuracy(model, asked, options.spider)
            runs.append({"variant": variant, "seed": seed, **found})
            write_text(options.output, json.dumps({**facts, "compared": compared(runs), "runs": runs}, indent=1))
    for line in compared(runs):
        apart = "" if line["above_bfloat16"] is None else f", {100 * line['above_bfloat16']:+.2f} % from bfloat16"
        right = f"; {line['right']} of {line['questions']} questions answered right" if line["questions"] else ""
        held_out = f"held-out loss {line['held_out_loss']:.4f} over {len(line['seeds'])} seeds"
        print(f"{line['variant']}: {held_out}{apart}{right}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
