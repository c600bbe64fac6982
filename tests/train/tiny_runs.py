"""Runs of a tiny model, whole or stopped on the way."""

from __future__ import annotations

import signal
from pathlib import Path

from fitune.config import load
from fitune.config.schema import RunConfig
from fitune.train.loop import StepRecord
from fitune.train.run import Outcome, plan_run, prepare_run, train_run
from fitune.train.run_folder import RunFolder

STEPS = 6


def config_of(place: Path, *overrides: str) -> RunConfig:
    path = place / "run.yaml"
    path.write_text(
        f"model: {place / 'model'}\ndata:\n  train: {place / 'train.jsonl'}\n  max_tokens: 256\n"
        f"train:\n  steps: {STEPS}\n  micro_batch: 1\n  accumulation: 2\n  learning_rate: 0.01\n  threads: 1\n"
        "  save_every_steps: 2\n  keep_checkpoints: 2\n"
    )
    return load(path, overrides)


def run(config: RunConfig, folder: Path, resume: bool = False, watch=None, say=lambda line: None) -> Outcome:
    prepared = prepare_run(config)
    return train_run(prepared, plan_run(prepared, with_time=False), RunFolder(folder), resume, watch, say=say)


def stop_after(step: int):
    """A watcher that sends this process SIGTERM, as a scheduler would."""

    def watch(record: object) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            signal.raise_signal(signal.SIGTERM)

    return watch


def adapter_bits(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
