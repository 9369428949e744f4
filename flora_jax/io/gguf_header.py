"""The header of a GGUF file (versions 2 and 3): metadata and tensor table, every length checked.

Read here and not by the ``gguf`` package: that reader builds one object per token of the
vocabulary (2 s for 49k tokens) and trusts the counts in the file, so that a forged one makes it
loop for ever or return short arrays. Type codes and block sizes are the package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from flora_jax.core.errors import FormatError, nearest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
MAX_DIMS = 4


class TensorInfo(NamedTuple):
    """Where a tensor lies; the shape is row-major, ``(out, in)`` for a matrix."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """``fields``: metadata values; ``tensors``: the table."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def need(self, key: str) -> Any:
        """A metadata value.

        Raises:
          FormatError: absent.
        """
        if key not in self.fields:
            close = ", ".join(nearest(key, self.fields)) or "none"
            raise FormatError(f"{self.path}: no metadata {key!r}; nearest: {close}")
        return self.fields[key]


class _Cursor:
    """Reads forward through the bytes and never past their end."""

    def __init__(self, path: Path, data: Any):
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what} at byte {self.at} of {len(self.data)}")

    def take(self, n: int, what: str) -> bytes:
        if n > len(self.data) - self.at:
            raise self.fail(f"truncated or forged: {what} of {n} bytes")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", f"length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == ARRAY:
            return self.array(what)
        raise self.fail(f"{what} has unknown type {kind}")

    def array(self, what: str) -> Any:
        kind, count = self.number("I", f"type of {what}"), self.number("Q", f"count of {what}")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        # A string has at least its eight bytes of length, so a forged count fails before the loop.
        if count * 8 > len(self.data) - self.at:
            raise self.fail(f"truncated or forged: {what} of {count} values")
        if kind != STRING:
            raise self.fail(f"{what} is an array of unknown type {kind}")
        return [self.string(what) for _ in range(count)]


def _tensor(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """One row of the tensor table; the offset is still relative to the data section."""
    name = cursor.string("a tensor's name")
    n_dims = cursor.number("I", f"rank of {name}")
    if n_dims > MAX_DIMS:
        raise cursor.fail(f"{name} has rank {n_dims}, at most {MAX_DIMS} are possible")
    dims = [cursor.number("Q", f"shape of {name}") for _ in range(n_dims)]
    code, offset = cursor.number("I", f"type of {name}"), cursor.number("Q", f"offset of {name}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise cursor.fail(f"{name} has unknown type {code}") from None
    block, size = GGML_QUANT_SIZES[kind]
    if dims and dims[0] % block:
        raise cursor.fail(f"{name}: rows of {dims[0]} do not divide into blocks of {block}")
    nbytes = math.prod(dims) // block * size
    return name, TensorInfo(kind, tuple(reversed(dims)), offset, nbytes)


def _parse(path: Path, data: Any) -> Header:
    cursor = _Cursor(path, data)
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise FormatError(f"{path}: begins with {magic!r}, a GGUF file with {MAGIC!r}")
    version = cursor.number("I", "version")
    if version not in VERSIONS:
        raise FormatError(f"{path}: GGUF version {version}; known: {VERSIONS} (little-endian)")
    n_tensors, n_fields = cursor.number("Q", "tensor count"), cursor.number("Q", "field count")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string("a metadata key")
        if key in fields:
            raise cursor.fail(f"metadata {key!r} is given twice")
        fields[key] = cursor.value(cursor.number("I", f"type of {key}"), key)
    rows: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name, info = _tensor(cursor)
        if name in rows:
            raise cursor.fail(f"tensor {name!r} is given twice")
        rows[name] = info
    align = fields.get("general.alignment", 32)
    if not isinstance(align, int) or align <= 0 or align & (align - 1):
        raise FormatError(f"{path}: general.alignment {align!r} is no power of two")
    start = -(-cursor.at // align) * align
    tensors = {}
    for name, info in rows.items():
        info = info._replace(offset=start + info.offset)
        if info.offset + info.nbytes > len(data):
            raise FormatError(
                f"{path}: truncated: {name} ends at byte {info.offset + info.nbytes} of {len(data)}"
            )
        tensors[name] = info
    return Header(path, fields, tensors)


def read_header(path: str | Path) -> Header:
    """Metadata and tensor table of a GGUF file.

    Raises:
      FormatError: no such file, wrong magic or version, truncated, or a count, rank, type or
        offset that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise FormatError(f"{path}: {path.stat().st_size} bytes; a GGUF header has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, data)
