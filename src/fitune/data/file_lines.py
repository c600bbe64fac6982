"""A data file in, its bytes or lines out, decompressed; only a little of it in memory at a time."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fitune.errors import InputError

COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 1 << 20
# A longer record is no sample: it would be some ten million tokens.
RECORD_BYTES = 64 << 20
# Text shrinks to a tenth or a twentieth, records that repeat a long prompt to a hundredth; gzip can do a thousandth.
MOST_EXPANDED = 300
EXPANDED_FREELY = 256 << 20
# Of zstandard's input at a time: a block of 4 bytes can stand for 128 KiB, so this for 16 MiB.
_ZSTD_BYTES = 512


def blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes as text has them: decompressed, in order, in pieces of about `BLOCK_BYTES`.

    What it is compressed with shows in its first bytes, and its name must agree.

    Raises:
        InputError: it cannot be read; the compressed file is damaged, cut short, or grows beyond all measure; or
            the text is UTF-16.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError("the file is UTF-16; save it as UTF-8", where=path)
            if magic[:2] == b"\x1f\x8b":
                yield from _measured(_gunzipped(file), path)
            elif magic == b"\x28\xb5\x2f\xfd":
                yield from _measured(_unzstd(file, path), path)
            elif path.suffix.lower() in COMPRESSED and magic:
                kind = {".gz": "gzip", ".zst": "zstandard"}[path.suffix.lower()]
                raise InputError(f"the name ends in {path.suffix} but the file is not {kind}", where=path)
            else:
                while block := file.read(BLOCK_BYTES):
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"the gzip file is cut short or damaged ({error})", where=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=path) from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Every line with its number from 1, without its "\n"; a mark at the file's beginning is taken away.

    A line longer than `RECORD_BYTES` comes as so many of its bytes and one more; the rest of it is passed over.
    Only "\n" ends a line: others that str.splitlines knows may stand inside of JSON strings.
    """
    number, parts, held = 1, [], 0
    for place, block in enumerate(blocks(path)):
        start = 3 if place == 0 and block.startswith(b"\xef\xbb\xbf") else 0
        while (end := block.find(b"\n", start)) >= 0:
            parts.append(block[start : min(end, start + RECORD_BYTES + 1 - held)])
            yield number, b"".join(parts)
            number, parts, held, start = number + 1, [], 0, end + 1
        kept = block[start : start + RECORD_BYTES + 1 - held]
        if kept:
            parts.append(kept)
            held += len(kept)
    if parts:
        yield number, b"".join(parts)


def not_utf8(error: UnicodeDecodeError) -> str:
    """A sentence on bytes that are not UTF-8."""
    found = " ".join(f"{byte:02x}" for byte in error.object[error.start : error.end])
    return f"not UTF-8 (byte {found}); save it as UTF-8"


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _unzstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    zstandard = zstandard_for(path)
    decompressor, frame = zstandard.ZstdDecompressor(), None
    while fed := file.read(_ZSTD_BYTES):
        while fed:
            frame = frame or decompressor.decompressobj()
            try:
                block = frame.decompress(fed)
            except zstandard.ZstdError as error:
                raise InputError(f"the zstandard file is damaged ({error})", where=path) from None
            yield from (block[at : at + BLOCK_BYTES] for at in range(0, len(block), BLOCK_BYTES))
            fed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise InputError("the zstandard file is cut short", where=path)


def zstandard_for(path: Path) -> Any:
    """The package, or InputError on how to get it."""
    try:
        import zstandard
    except ImportError:
        raise InputError(
            "is compressed with zstandard, for which the package zstandard is missing; run: "
            "pip install 'fitune[data]'",
            where=path,
        ) from None
    return zstandard


def _measured(found: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The same blocks, as long as they are not more than a file of this size can honestly hold."""
    most = max(EXPANDED_FREELY, MOST_EXPANDED * path.stat().st_size)
    size = 0
    for block in found:
        size += len(block)
        if size > most:
            raise InputError(
                f"the file decompresses to more than {MOST_EXPANDED} times its size, as no text does; decompress "
                "it yourself if it is meant",
                where=path,
            )
        yield block
