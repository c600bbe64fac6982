"""A checkpoint whose quantised weights appear under their plain names, decoded one at a time when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fitune.models.checkpoint_files import CheckpointTensors


@dataclass(frozen=True)
class EncodedTensor:
    """One quantised weight.

    Attributes:
        parts: the names in the files that it is made of, and that no longer appear as tensors of their own.
        shape: of the decoded weight.
        dtype: of the decoded weight.
        decode: gives it.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[], Tensor]


@dataclass(frozen=True)
class Encoding:
    """How the quantised weights of a checkpoint are read.

    Attributes:
        tensors: by the name that the weight would have in a plain checkpoint.
        note: the sentence that every report about the model carries.
        unused: names in the files that only computing with the quantised weights needs (scales of activations).
    """

    tensors: dict[str, EncodedTensor]
    note: str
    unused: frozenset[str] = field(default_factory=frozenset)


class DecodedTensors(CheckpointTensors):
    """`files` with their quantised weights decoded; all other tensors as they lie there."""

    def __init__(self, files: CheckpointTensors, encoding: Encoding) -> None:
        self._files = files
        self._encoded = encoding.tensors
        whole = {part: name for name, tensor in encoding.tensors.items() for part in tensor.parts}
        found = (whole.get(name, name) for name in files.names() if name not in encoding.unused)
        self._names = list(dict.fromkeys(found))

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._encoded[name].shape if name in self._encoded else self._files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._encoded[name].dtype if name in self._encoded else self._files.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._encoded:
            return self._files.read(name)
        encoded = self._encoded[name]
        return encoded.decode().to(encoded.dtype).reshape(encoded.shape)

    def release(self) -> None:
        self._files.release()
