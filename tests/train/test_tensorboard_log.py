from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fitune.train.loop import StepRecord, ValidationRecord
from fitune.train.tensorboard_log import TensorBoardLog


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "board")
    for step in (1, 2, 3):
        log(StepRecord(step, 0.1 * step, 5.0 / step, 1.5, 1e-4, 100, 50, 25.0, 10**9, float(step)))
    log(ValidationRecord(3, 1.25))
    log.close()
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 5.0), (2, 2.5), (3, pytest.approx(5 / 3)),
    ]  # fmt: skip
    assert [(event.step, event.value) for event in read.Scalars("validation/loss")] == [(3, 1.25)]
    assert read.FirstEventTimestamp() > 0
