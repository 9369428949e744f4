"""Documents and the files they come from: text, JSON lines, JSON, TSV, CSV, Parquet.

A *source* is a read-only sequence (``len``, integer indexing, ``name(i)`` for messages); nothing
is held in memory but offsets, so that corpora larger than memory can be read lazily.
"""

from __future__ import annotations

import bisect
import csv
import dataclasses
import functools
import glob
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flora_jax.core.errors import ConfigError, FormatError, nearest

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".tsv", ".csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the fields of a record (JSON object, Parquet row, TSV or CSV row).

    Attributes:
        text: the whole text of a document.
        text_pair: the second text of a pair (classification only, if present).
        prompt, completion: an instruction and its answer.
        messages: a chat, a list of ``{"role": ..., "content": ...}``.
        label: the class of a text (classification only).
    """

    text: str = "text"
    text_pair: str = "text_pair"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    label: str = "label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text, as ``(text, trainable)`` pieces in order, or as the messages of a chat."""

    pieces: tuple[tuple[str, bool], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def plain(cls, text: str) -> Document:
        """A document of which everything is trained on."""
        return cls(pieces=((text, True),))


class Source(Protocol):
    """A random-access sequence of records or documents that can name its items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def name(self, index: int) -> str: ...


class TextFiles:
    """One document per text file (UTF-8; Python sources by their coding line)."""

    def __init__(self, paths: Sequence[Path], separator: str | None = None):
        self._paths = list(paths)
        self._separator = separator
        self._cut = [self._read(p).split(separator) for p in paths] if separator else None
        self._index = [
            (f, k)
            for f, texts in enumerate(self._cut or [[""]] * len(self._paths))
            for k, text in enumerate(texts)
            if not self._cut or text.strip()
        ]

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8 text (byte {error.start})") from None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Document:
        file, part = self._index[index]
        return Document.plain(self._cut[file][part] if self._cut else self._read(self._paths[file]))

    def name(self, index: int) -> str:
        file, part = self._index[index]
        return f"{self._paths[file]}" + (f" part {part + 1}" if self._cut else "")


class JsonLines:
    """One record per non-empty line; only the line offsets are kept in memory."""

    _BLOCK = 1 << 24

    def __init__(self, path: Path):
        self._path = path
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, "u1")
        size = len(self._bytes)
        ends = [
            start + np.flatnonzero(self._bytes[start : start + self._BLOCK] == ord("\n"))
            for start in range(0, size, self._BLOCK)
        ]
        stops = np.concatenate([*ends, [size]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1])
        some = np.flatnonzero(stops > starts)
        # Records begin with a brace; only lines that begin with a blank need a closer look.
        begins = self._bytes[starts[some]] > ord(" ")
        keep = [k for k, sure in zip(some, begins) if sure or self._text(starts[k], stops[k])]
        keep = np.array(keep, np.int64)
        self._starts, self._stops, self._line = starts[keep], stops[keep], keep + 1

    def _text(self, start: int, stop: int) -> bytes:
        return self._bytes[start:stop].tobytes().strip()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            record = json.loads(self._text(self._starts[index], self._stops[index]))
        except ValueError as error:
            raise FormatError(f"{self.name(index)}: malformed JSON: {error}") from None
        return _mapping(record, self.name(index))

    def name(self, index: int) -> str:
        return f"{self._path}:{self._line[index]}"


class Table:
    """Records that fit in memory: a JSON array, or a TSV or CSV file with a header line."""

    def __init__(self, path: Path):
        self._path = path
        read = _read_json if path.suffix.lower() == ".json" else _read_delimited
        self._records, self._names = read(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _mapping(self._records[index], self.name(index))

    def name(self, index: int) -> str:
        return f"{self._path}{self._names[index]}"


def _mapping(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise FormatError(f"{where}: expected an object, got {type(record).__name__}")
    return record


def _read_json(path: Path) -> tuple[list[Any], list[str]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(records, list):
        raise FormatError(f"{path}: expected a JSON array of objects (one per line is .jsonl)")
    return records, [f" item {k}" for k in range(len(records))]


def _read_delimited(path: Path) -> tuple[list[Any], list[str]]:
    """TSV without quoting, as the benchmarks have it, and CSV with quoting."""
    text = TextFiles._read(path)
    if path.suffix.lower() == ".tsv":
        # Not splitlines, which also cuts at form feeds and the like inside a field.
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        rows = [(k, line.split("\t")) for k, line in enumerate(lines, start=1)]
    else:
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader if row]
    header = rows[0][1] if rows else []
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise FormatError(f"{path}:{line}: {len(row)} columns, the header has {len(header)}")
    records = [dict(zip(header, row)) for _, row in rows[1:]]
    return records, [f":{line}" for line, _ in rows[1:]]


class Parquet:
    """Rows of a Parquet file; a few row groups are kept decoded."""

    def __init__(self, path: Path):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ConfigError(f"{path}: Parquet needs pyarrow (pip install pyarrow)") from None
        self._path, self._errors = path, (pa.ArrowException, OSError)
        self._file = self._checked(pq.ParquetFile, path)
        meta = self._file.metadata
        rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self._first = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def _read_group(self, group: int) -> list[Mapping[str, Any]]:
        return self._checked(self._file.read_row_group, group).to_pylist()

    def _checked(self, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return read(*args)
        except self._errors as error:
            raise FormatError(f"{self._path}: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._first, index, "right")) - 1
        with self._lock:
            return self._group(group)[index - int(self._first[group])]

    def name(self, index: int) -> str:
        return f"{self._path} row {index}"


class Documents:
    """Turns records into documents: a chat, a prompt with its completion, or a text."""

    def __init__(self, records: Source, fields: Fields):
        self._records, self._fields = records, fields

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        record, f, where = self._records[index], self._fields, self.name(index)
        if f.messages in record:
            return Document(messages=_messages(record[f.messages], where))
        if f.prompt in record or f.completion in record:
            prompt, completion = (field(record, k, where) for k in (f.prompt, f.completion))
            return Document(pieces=((prompt, False), (completion, True)))
        return Document.plain(field(record, f.text, where))

    def name(self, index: int) -> str:
        return self._records.name(index)


class Concatenated:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = list(parts)
        self._first = np.concatenate([[0], np.cumsum([len(p) for p in parts], dtype=np.int64)])

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect.bisect_right(self._first, index) - 1
        return self._parts[part], index - int(self._first[part])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Any:
        part, k = self._find(index)
        return part[k]

    def name(self, index: int) -> str:
        part, k = self._find(index)
        return part.name(k)


class Subset:
    """The items of a source at the given indices."""

    def __init__(self, parent: Source, indices: np.ndarray):
        self._parent, self._indices = parent, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._parent[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._parent.name(int(self._indices[index]))


class InMemory:
    """Items given directly, with an optional name each."""

    def __init__(self, items: Sequence[Any], names: Sequence[str] | None = None):
        self._items, self._names = items, names

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]

    def name(self, index: int) -> str:
        return self._names[index] if self._names else f"item {index}"


def field(record: Mapping[str, Any], key: str, where: str, kind: type = str) -> Any:
    """``record[key]``, which must be there and of the right type; errors name file and line."""
    if key not in record:
        close = ", ".join(nearest(key, map(str, record))) or "none"
        raise FormatError(f"{where}: field {key!r} is missing; fields there: {close}")
    if not isinstance(record[key], kind):
        got = type(record[key]).__name__
        raise FormatError(f"{where}: field {key!r} must be {kind.__name__}, got {got}")
    return record[key]


def _messages(messages: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{where}: messages must be a non-empty list")
    for k, message in enumerate(messages):
        for key in ("role", "content"):
            field(_mapping(message, f"{where} message {k}"), key, f"{where} message {k}")
    return tuple(messages)


def find_files(pattern: str) -> list[Path]:
    """Files of a path, a glob (``**`` allowed) or a directory (known suffixes), in sorted order."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        known = TEXT_SUFFIXES + RECORD_SUFFIXES
        found = [p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file()]
    else:
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        found = found or ([path] if path.is_file() else [])
    if not found:
        raise ConfigError(f"no data file at {pattern!r}")
    return sorted(found)


def open_records(paths: Sequence[Path]) -> Source:
    """The records of JSON lines, JSON, TSV, CSV and Parquet files."""
    readers = {".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": Parquet}
    readers |= dict.fromkeys((".json", ".tsv", ".csv"), Table)
    for path in paths:
        if path.suffix.lower() not in readers:
            known = ", ".join(RECORD_SUFFIXES)
            raise ConfigError(f"{path}: not a file of records; known suffixes: {known}")
    return Concatenated([readers[p.suffix.lower()](p) for p in paths])


def open_documents(paths: Sequence[Path], fields: Fields, separator: str | None = None) -> Source:
    """The documents of files of any known kind; whatever holds no records is read as text."""
    parts: list[Source] = []
    for path in paths:
        if path.suffix.lower() in RECORD_SUFFIXES:
            parts.append(Documents(open_records([path]), fields))
        else:
            parts.append(TextFiles([path], separator))
    return Concatenated(parts)
