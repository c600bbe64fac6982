"""From files to batches: reading, chat templates and masks, length, packing, and the report on all of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitune.data.batch import Batch
    from fitune.data.chat_template import ChatTemplate
    from fitune.data.collation import collate
    from fitune.data.conversation import Message, Origin, Sample
    from fitune.data.dataset import TrainingData, load_training_data
    from fitune.data.encoding import EncodedSample, Encoder, encode, encode_prompt, encoder_for
    from fitune.data.length import fit_length
    from fitune.data.order import epoch_rows
    from fitune.data.packing import pack
    from fitune.data.reading import detect_format, read_samples
    from fitune.data.report import DataReport

# Each name's room is imported when the name is first used: `batch` and `collation` need torch, the others not.
_ROOMS = {
    "Batch": "batch",
    "ChatTemplate": "chat_template",
    "DataReport": "report",
    "EncodedSample": "encoding",
    "Encoder": "encoding",
    "Message": "conversation",
    "Origin": "conversation",
    "Sample": "conversation",
    "TrainingData": "dataset",
    "collate": "collation",
    "detect_format": "reading",
    "encode": "encoding",
    "encode_prompt": "encoding",
    "encoder_for": "encoding",
    "epoch_rows": "order",
    "fit_length": "length",
    "load_training_data": "dataset",
    "pack": "packing",
    "read_samples": "reading",
}

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataReport",
    "EncodedSample",
    "Encoder",
    "Message",
    "Origin",
    "Sample",
    "TrainingData",
    "collate",
    "detect_format",
    "encode",
    "encode_prompt",
    "encoder_for",
    "epoch_rows",
    "fit_length",
    "load_training_data",
    "pack",
    "read_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
