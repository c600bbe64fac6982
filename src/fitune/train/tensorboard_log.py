"""A run's records as TensorBoard events, in the run folder: `tensorboard --logdir runs`."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fitune.train.loop import Record
from fitune.train.patient_file import PatientFile
from fitune.train.scalars import scalars_of


class TensorBoardLog:
    """Writes every record as scalars; usable as `watch=`."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = PatientFile(folder / name, say)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __call__(self, record: Record) -> None:
        scalars = scalars_of(record)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=record.step, summary=Summary(value=values)))

    def close(self) -> None:
        """Writes what is pending."""
        self._file.close()

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())
