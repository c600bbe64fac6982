"""A run's records as TensorBoard events, in the run folder: `tensorboard --logdir runs`."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fitune.train.loop import StepRecord, ValidationRecord


class TensorBoardLog:
    """Writes every record as scalars; usable as `watch=`."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def __call__(self, record: StepRecord | ValidationRecord) -> None:
        if isinstance(record, ValidationRecord):
            scalars = {"validation/loss": record.validation_loss}
        else:
            scalars = {
                "train/loss": record.loss,
                "train/learning_rate": record.learning_rate,
                "train/grad_norm": record.grad_norm,
                "speed/tokens_per_second": record.tokens_per_second,
                "memory/resident_bytes": float(record.memory_bytes),
            }
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=record.step, summary=Summary(value=values)))

    def close(self) -> None:
        """Writes what is pending."""
        self._writer.close()
