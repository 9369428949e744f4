"""safetensors files and sharded directories, read tensor by tensor and written atomically."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from flora_jax.core.errors import FormatError, nearest
from flora_jax.io.files import atomic, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


class Entry(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """``({name: entry}, metadata)`` of one file.

    The library checks the header (lengths, overlaps, sizes against dtypes, end of file); the
    offsets are then read here because its numpy front end has no fp8.

    Raises:
      FormatError: missing, truncated or forged, or of a dtype without a numpy name.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as checked:
            metadata = dict(checked.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        if info["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise FormatError(f"{path}: {name} has dtype {info['dtype']}; known: {known}")
        dtype = np.dtype(DTYPES[info["dtype"]])
        begin = 8 + length + info["data_offsets"][0]
        entries[name] = Entry(path, begin, tuple(info["shape"]), dtype)
    return entries, metadata


def _shards(path: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The files behind a path and the names each must hold (``None``: whatever it holds)."""
    if not path.is_dir():
        yield path, None
    elif (path / SINGLE).is_file():
        yield path / SINGLE, None
    elif (path / INDEX).is_file():
        weights = read_json(path / INDEX).get("weight_map")
        if not isinstance(weights, dict):
            raise FormatError(f"{path / INDEX}: no 'weight_map' object")
        for file in sorted(set(weights.values())):
            if Path(file).name != file:
                raise FormatError(f"{path / INDEX}: shard {file!r} lies outside the folder")
            yield path / file, {name for name, where in weights.items() if where == file}
    else:
        found = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f"; it holds {', '.join(found)}: give that file's path" if found else ""
        raise FormatError(f"{path}: neither {SINGLE} nor {INDEX}{hint}")


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a file, or of a directory (single or sharded); each is read when asked for.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(folder, {"a": np.ones((2, 3), np.float32)})
    >>> files = TensorFiles(folder)
    >>> list(files), files.shape("a"), files["a"].sum()
    (['a'], (2, 3), np.float32(6.0))
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for file, names in _shards(self.path):
            entries, metadata = read_header(file)
            for name in sorted((names or set()) - set(entries)):
                raise FormatError(f"{file}: the index promises {name!r}, which is not there")
            for name in sorted(set(entries) & set(self.entries)):
                raise FormatError(f"{file}: {name!r} is also in {self.entries[name].file.name}")
            self.entries |= entries
            self.metadata |= metadata

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            close = ", ".join(nearest(name, self.entries)) or "none"
            raise KeyError(f"{self.path}: no tensor {name!r}; nearest: {close}")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory map: no bytes are read before they are used."""
        entry = self._entry(name)
        if 0 in entry.shape:
            return np.zeros(entry.shape, entry.dtype)
        mapped = np.memmap(entry.file, entry.dtype, "r", entry.offset, entry.shape or (1,))
        return mapped.view(np.ndarray).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def save_one(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file, atomically; values are turned into contiguous numpy arrays."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    arrays = {name: array.reshape(np.shape(tensors[name])) for name, array in arrays.items()}
    with atomic(path) as partial:
        save_file(arrays, str(partial), metadata=dict(metadata or {}) or None)


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard is over the limit (a larger tensor stands alone)."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def save(
    folder: str | Path,
    tensors: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    sizes: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> None:
    """``model.safetensors``, or numbered shards and an index, in ``folder``.

    Args:
      tensors: read one shard at a time, so a lazy mapping is never held whole.
      sizes: bytes per tensor, in writing order; given by the arrays when absent.
      overwrite: replace the weights that the folder already holds.

    Raises:
      FormatError: the folder holds weights and ``overwrite`` is false.
    """
    folder = Path(folder)
    old = [p for p in folder.glob("model*.safetensors*") if not p.name.startswith(".")]
    if old and not overwrite:
        raise FormatError(f"{folder}: already holds {old[0].name}; pass overwrite=True")
    sizes = sizes or {name: np.asarray(value).nbytes for name, value in tensors.items()}
    groups = _groups(sizes, max_shard_bytes)
    written = set()
    if len(groups) == 1:
        save_one(folder / SINGLE, {n: tensors[n] for n in groups[0]}, {"format": "pt"})
        written.add(SINGLE)
    else:
        written = _save_shards(folder, tensors, groups, sum(sizes.values()))
    for path in old:
        if path.name not in written:
            path.unlink()


def _save_shards(
    folder: Path, tensors: Mapping[str, Any], groups: Iterable[list[str]], total: int
) -> set[str]:
    groups = list(groups)
    weights = {}
    for index, names in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        save_one(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
        weights |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
    return {*weights.values(), INDEX}
