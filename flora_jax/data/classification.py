"""Sequence classification: texts, or pairs of texts, with a label each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data import pipeline
from flora_jax.data.corpora import PythonFiles, fortune_files, wordnet_glosses
from flora_jax.data.documents import (
    Concatenated,
    Fields,
    InMemory,
    Source,
    field,
    find_files,
    open_records,
)
from flora_jax.data.packing import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Labelled texts for encoders.

    Batches: ``tokens``, ``mask`` (1 for a token, 0 for padding) and ``token_types`` (1 in the
    second text of a pair) int32 [B, T], ``label`` int32 [B], ``weight`` float32 [B]. A row is
    ``bos text eos`` or ``bos text eos pair eos``, which is BERT's ``[CLS] a [SEP] b [SEP]`` when
    the tokenizer's bos and eos are those.

    Attributes:
        source: ``.jsonl``, ``.json``, ``.tsv``, ``.csv`` or ``.parquet`` files of records
            with ``text``, ``label`` and optionally ``text_pair``; a VADER ``*_GroundTruth.txt``;
            or ``python-packages`` (which package of the standard library a paragraph of a
            docstring documents; needs only Python), ``fortunes`` (topic of an epigram),
            ``wordnet-noun``, ``wordnet-verb`` (supersense of a gloss).
        eval_source: test data of its own; then nothing is split from ``source``.
        fields: field names of the records.
        labels: the classes in order; by default the sorted labels that occur.
        seq_len: T.
        too_long: texts of more than T tokens: ``truncate`` (the longer of a pair first), ``drop``
            or ``error``.
        split_fraction, split_seed, max_examples: as in ``TextData``.
        shuffle, epochs, prefetch: see ``pipeline.training_batches``.
    """

    source: str | tuple[str, ...]
    eval_source: str | tuple[str, ...] | None = None
    fields: Fields = Fields()
    labels: tuple[str, ...] | None = None
    seq_len: int = 128
    too_long: str = "truncate"
    split_fraction: float = 0.2
    split_seed: int = 0
    max_examples: int | None = None
    shuffle: bool = True
    epochs: int | None = None
    prefetch: int = 0

    def __post_init__(self) -> None:
        if self.too_long not in ("truncate", "drop", "error"):
            raise ConfigError(f"too_long must be truncate, drop or error, got {self.too_long!r}")
        if self.seq_len < 4:
            raise ConfigError(f"seq_len must be at least 4, got {self.seq_len}")
        pipeline.check_fraction(self.split_fraction)

    def train(
        self,
        tokenizer: Any,
        batch_size: int,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Shuffled training batches of this process's share of the examples."""
        rows = self._rows(tokenizer, "train")
        return pipeline.training_batches(
            grain.MapDataset.range(len(rows)).map(lambda i: self._row(rows[int(i)])),
            batch_size=batch_size,
            seed=seed,
            shard=shard,
            epochs=self.epochs,
            shuffle=self.shuffle,
            prefetch=self.prefetch,
        )

    def evaluation(
        self,
        tokenizer: Any,
        batch_size: int,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """Every test example once; the last batch is filled with examples of weight zero."""
        rows = self._rows(tokenizer, "held-out")
        empty = {name: np.zeros_like(x) for name, x in self._row(rows[0]).items()}
        return pipeline.evaluation_batches(
            lambda i: self._row(rows[i]),
            len(rows),
            empty,
            batch_size=batch_size,
            max_batches=max_batches,
            shard=shard,
        )

    @property
    def num_classes(self) -> int:
        """Outputs that a classifier needs."""
        return len(self.class_names)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, in the order of the integers in a batch."""
        if self.labels is not None:
            return self.labels
        found = {self._label(part, i) for part in self._parts.values() for i in range(len(part))}
        numbers = all(name.lstrip("-").isdigit() for name in found)
        return tuple(sorted(found, key=int if numbers else None))

    def _label(self, part: Source, index: int) -> str:
        where, key = part.name(index), self.fields.label
        value = field(part[index], key, where, kind=object)
        if not isinstance(value, (str, int)):
            raise FormatError(f"{where}: field {key!r} must be text or an integer, got {value!r}")
        return str(value)

    @functools.cached_property
    def _parts(self) -> dict[str, Source]:
        what = f"source {self.source!r}"
        source = pipeline.limit(self._open(self.source), self.max_examples)
        pipeline.require(source, what)
        if self.eval_source is not None:
            return {"train": source, "held-out": self._open(self.eval_source)}
        train, held = pipeline.split(source, self.split_fraction, self.split_seed, what)
        return {"train": train, "held-out": held}

    def _open(self, source: str | tuple[str, ...]) -> Source:
        names = [source] if isinstance(source, str) else list(source)
        return Concatenated([open_labelled(name, self.fields) for name in names])

    @functools.cached_property
    def _cache(self) -> dict[Any, Any]:
        return {}

    def _rows(self, tokenizer: Any, part: str) -> list[tuple[list[int], list[int], int]]:
        """Tokens of both texts and the label of every example, made once per tokenizer."""
        key = (id(tokenizer), part)
        if key not in self._cache:
            source, rows = self._parts[part], []
            numbers = {name: k for k, name in enumerate(self.class_names)}
            for i in range(len(source)):
                name = self._label(source, i)
                if name not in numbers:
                    known = ", ".join(self.class_names)
                    raise FormatError(f"{source.name(i)}: label {name!r} is not one of {known}")
                texts = self._encode(tokenizer, source[i], source.name(i))
                if texts is not None:
                    rows.append((*texts, numbers[name]))
            pipeline.require(rows, f"{part} part of {self.source!r}")
            # The tokenizer is kept so that its id stays its own.
            self._cache[key] = (tokenizer, rows)
        return self._cache[key][1]

    def _encode(
        self, tokenizer: Any, record: Mapping[str, Any], where: str
    ) -> tuple[list[int], list[int]] | None:
        """``bos text eos`` and ``pair eos`` (empty without a pair), or None if dropped."""
        bos = getattr(tokenizer, "bos_id", None)
        head = [] if bos is None else [bos]
        first = list(tokenizer.encode(field(record, self.fields.text, where)))
        paired, second = self.fields.text_pair in record, []
        if paired:
            second = list(tokenizer.encode(field(record, self.fields.text_pair, where)))
        room = self.seq_len - len(head) - 1 - paired
        if len(first) + len(second) > room:
            if self.too_long == "drop":
                return None
            if self.too_long == "error":
                raise FormatError(
                    f"{where}: {len(first) + len(second)} tokens exceed the room for {room}"
                    f" in seq_len={self.seq_len}; raise it or set too_long to truncate or drop"
                )
            first, second = _truncate(first, second, room)
        return head + first + [tokenizer.eos_id], second + [tokenizer.eos_id] * paired

    def _row(self, row: tuple[list[int], list[int], int]) -> Batch:
        first, second, label = row
        n = len(first) + len(second)
        out = {k: np.zeros(self.seq_len, np.int32) for k in ("tokens", "mask", "token_types")}
        out["tokens"][:n] = first + second
        out["mask"][:n] = 1
        out["token_types"][len(first) : n] = 1
        return out | {"label": np.int32(label), "weight": np.float32(1)}


def _truncate(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Shortens the longer text until both fit, as BERT's ``longest_first`` does."""
    keep = min(len(second), max(room // 2, room - len(first)))
    return first[: room - keep], second[:keep]


def _vader(path: Path, fields: Fields) -> Source:
    """Sentiment of the VADER ground-truth files: ``id, score, text``; near-neutral ones left out.

    C. Hutto, E. Gilbert, ICWSM 2014.
    """
    records, names = [], []
    lines = path.read_text("latin-1").splitlines()
    for k, line in enumerate(lines, start=1):
        try:
            _, score, text = line.split("\t", 2)
            value = float(score)
        except ValueError:
            raise FormatError(f"{path}:{k}: expected id, score and text with tabs") from None
        if abs(value) > 0.5:
            label = "positive" if value > 0 else "negative"
            records.append({fields.text: text, fields.label: label})
            names.append(f"{path}:{k}")
    return InMemory(records, names)


def _fortunes(fields: Fields) -> Source:
    pairs = ((topic, text) for topic, texts in fortune_files().items() for text in texts)
    return InMemory([{fields.text: text, fields.label: topic} for topic, text in pairs])


def _glosses(part: str, fields: Fields) -> Source:
    pairs = wordnet_glosses(part)
    return InMemory([{fields.text: text, fields.label: str(kind)} for kind, text in pairs])


# Packages that every Python from 3.11 to 3.13 has, each with a hundred paragraphs or more.
_DOCUMENTED = ("asyncio", "email", "http", "importlib", "logging", "unittest", "urllib", "xml")


def _python_packages(fields: Fields) -> Source:
    """Paragraphs of the standard library's docstrings; the label is the package they document."""
    modules = PythonFiles(docstrings=True)
    found: dict[str, str] = {}
    for k in range(len(modules)):
        package, _, rest = modules.name(k).partition("/")
        if rest and package in _DOCUMENTED:
            text = "".join(piece for piece, _ in modules[k].pieces)
            paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
            found |= {part: package for part in paragraphs if len(part) >= 60}
    return InMemory([{fields.text: text, fields.label: label} for text, label in found.items()])


LABELLED: dict[str, tuple[str, Callable[[Fields], Source]]] = {
    "fortunes": ("fortunes", _fortunes),
    "python-packages": ("python3", _python_packages),
    "wordnet-noun": ("wordnet-base", functools.partial(_glosses, "noun")),
    "wordnet-verb": ("wordnet-base", functools.partial(_glosses, "verb")),
}


def open_labelled(name: str, fields: Fields) -> Source:
    """Records with a text and a label of a named set, a file, a glob or a directory."""
    if name in LABELLED:
        package, read = LABELLED[name]
        try:
            return read(fields)
        except FileNotFoundError as error:
            raise ConfigError(
                f"labelled set {name!r} is not installed: {error};"
                f" install it with: apt-get install {package}"
            ) from None
    paths = find_files(name)
    truth = [p for p in paths if p.name.endswith("_GroundTruth.txt")]
    others = [p for p in paths if p not in truth]
    parts = [_vader(p, fields) for p in truth]
    return Concatenated([*parts, open_records(others)] if others else parts)
