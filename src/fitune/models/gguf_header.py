"""A GGUF file's header: metadata and the place of every tensor, checked against the file's length.

The layout (ggml's docs/gguf.md): magic, version, two counts, key-value pairs, tensor entries, padding to
`general.alignment`, tensor data. The `gguf` package's reader makes a numpy array of every string's length and
bytes, seconds for today's vocabularies; this one takes a tenth of a second and says where a file is cut.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from fitune.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT_BYTES = 32

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file.

    Attributes:
        shape: in torch's order (GGUF writes the fastest dimension first).
        type: how the values are stored.
        start_byte, size_bytes: its place, from the beginning of the file.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start_byte: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself; arrays of strings are lists, arrays of numbers are numpy arrays."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: Path) -> GGUFHeader:
    """File -> header. Raises InputError where it is missing, not GGUF, of an unknown version or cut short."""
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            start = file.read(8)
            if start[:4] != MAGIC:
                what = "is empty" if not start else f"begins with {start[:4]!r}, a GGUF file begins with {MAGIC!r}"
                raise InputError(f"not a GGUF file: it {what}", where=path)
            if size_bytes < 24:
                raise InputError(f"cut short: only {size_bytes} bytes are there; fetch it again", where=path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Cursor(path, mapped).header()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error


class _Cursor:
    """Reads forward through the mapped header."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.at = 4

    def header(self) -> GGUFHeader:
        version = self.number("<I", 4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (written for a big-endian machine)" if swapped in VERSIONS else ""
            raise InputError(f"GGUF version {version}{hint}; versions {VERSIONS} are read", where=self.path)
        tensor_count, pair_count = self.number("<Q", 8), self.number("<Q", 8)
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.text()
            metadata[key] = self.value(self.value_type())
        entries = [self.tensor() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES))
        data_start = -(-self.at // alignment) * alignment
        tensors = {
            name: TensorEntry(shape, type_, data_start + offset, size_bytes)
            for name, shape, type_, offset, size_bytes in entries
        }
        self.check_length(tensors)
        return GGUFHeader(self.path, metadata, tensors)

    def check_length(self, tensors: dict[str, TensorEntry]) -> None:
        needed = max((entry.start_byte + entry.size_bytes for entry in tensors.values()), default=0)
        if needed > len(self.mapped):
            torn = [n for n, e in tensors.items() if e.start_byte + e.size_bytes > len(self.mapped)]
            raise InputError(
                f"cut short: {len(self.mapped)} of {needed} bytes are there, {len(torn)} of {len(tensors)} "
                f"tensors are incomplete (first: {torn[0]}); fetch it again",
                where=self.path,
            )

    def take(self, count: int) -> int:
        """Moves on by `count` bytes and returns where they begin."""
        start = self.at
        if start + count > len(self.mapped):
            raise InputError(
                f"cut short or damaged: the header goes on beyond the file's {len(self.mapped)} bytes; "
                "fetch it again",
                where=self.path,
            )
        self.at = start + count
        return start

    def number(self, layout: str, width: int) -> int:
        return int(struct.unpack_from(layout, self.mapped, self.take(width))[0])

    def text(self) -> str:
        length = self.number("<Q", 8)
        start = self.take(length)
        # Some vocabularies carry single bytes of a longer character: keep them instead of failing.
        return self.mapped[start : start + length].decode("utf-8", errors="replace")

    def value_type(self) -> GGUFValueType:
        code = self.number("<I", 4)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise InputError(f"damaged: unknown value type {code} near byte {self.at}", where=self.path) from None

    def value(self, type_: GGUFValueType) -> Any:
        if type_ == GGUFValueType.STRING:
            return self.text()
        if type_ == GGUFValueType.ARRAY:
            of, count = self.value_type(), self.number("<Q", 8)
            if of in _SCALARS:
                start = self.take(count * _SCALARS[of].itemsize)
                return np.frombuffer(self.mapped, _SCALARS[of], count, start).copy()
            return [self.value(of) for _ in range(count)]
        dtype = _SCALARS[type_]
        return np.frombuffer(self.mapped, dtype, 1, self.take(dtype.itemsize))[0].item()

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        name = self.text()
        dimensions = self.number("<I", 4)
        shape = tuple(self.number("<Q", 8) for _ in range(dimensions))[::-1]
        code = self.number("<I", 4)
        offset = self.number("<Q", 8)
        try:
            type_ = GGMLQuantizationType(code)
        except ValueError:
            raise InputError(f"tensor {name}: unknown storage type {code}", where=self.path) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if not shape or shape[-1] % block:
            raise InputError(f"damaged: tensor {name} of shape {shape} is stored as {type_.name}", where=self.path)
        return name, shape, type_, offset, prod(shape) // block * block_bytes
