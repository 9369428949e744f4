"""Language-model data: sources, tokens, rows, batches."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import grain

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data import packing as packing_lib
from flora_jax.data import pipeline
from flora_jax.data.corpora import CORPORA, load_corpus
from flora_jax.data.documents import (
    Concatenated,
    Document,
    Fields,
    InMemory,
    Source,
    find_files,
    open_documents,
)
from flora_jax.data.encoding import Tokenizer, encode_document, tokenise
from flora_jax.data.packing import Tokenised
from flora_jax.data.streaming import stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData:
    """Text for language models.

    Example:
        >>> class Bytes:
        ...     eos_id = 256
        ...     def encode(self, text):
        ...         return list(text.encode())
        >>> data = TextData(source="python-docs", seq_len=64, max_documents=4)
        >>> batch = next(iter(data.train(Bytes(), batch_size=2, seed=0)))
        >>> {name: (x.shape, str(x.dtype)) for name, x in sorted(batch.items())}["tokens"]
        ((2, 64), 'int32')

    Attributes:
        source: a named corpus (``flora_jax.data.CORPORA``), a file, a glob or a directory, or
            several of them. ``.jsonl``, ``.json``, ``.parquet``, ``.tsv`` and ``.csv`` hold
            records, any other file is one document of plain text.
        eval_source: held-out data of its own; then nothing is split from ``source``.
        fields: field names of the records.
        separator: cuts plain-text files into documents, e.g. a blank line.
        seq_len: T, tokens in a row.
        packing: ``concat``, ``first_fit`` or ``none`` (see ``packing.plan_rows``).
        too_long: documents of more than T tokens: ``split``, ``truncate``, ``drop``, ``error``.
        completion_only: no loss on prompts and on what is not the assistant's in chats.
        add_bos: begin every document with ``tokenizer.bos_id``.
        split_fraction: share of the documents held out; a single plain text gives its tail.
        split_seed: of that choice, apart from the training seed.
        max_documents: read only the first so many documents.
        lazy: tokenise and pack while training, for corpora larger than memory.
        shuffle, epochs, prefetch: see ``pipeline.training_batches``.
    """

    source: str | tuple[str, ...]
    eval_source: str | tuple[str, ...] | None = None
    fields: Fields = Fields()
    separator: str | None = None
    seq_len: int = 256
    packing: str = "concat"
    too_long: str = "split"
    completion_only: bool = True
    add_bos: bool = False
    split_fraction: float = 0.1
    split_seed: int = 0
    max_documents: int | None = None
    lazy: bool = False
    shuffle: bool = True
    epochs: int | None = None
    prefetch: int = 0

    def __post_init__(self) -> None:
        packing_lib.check_choices(self.seq_len, self.packing, self.too_long)
        pipeline.check_fraction(self.split_fraction)

    def train(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Endless (or ``epochs`` long) shuffled batches of this process's share of the rows.

        Args:
            tokenizer: see ``Tokenizer``.
            batch_size: B over all shards.
            seed: of the order.
            shard: index of this process and number of processes.

        Returns:
            Batches as ``flora_jax.data`` describes; the iterator's ``get_state`` and ``set_state``
            resume it exactly.
        """
        if self.lazy:
            return stream(
                self._parts["train"],
                self._encode(tokenizer),
                seq_len=self.seq_len,
                packing=self.packing,
                too_long=self.too_long,
                batch_size=batch_size,
                seed=seed,
                shard=shard,
                epochs=self.epochs,
                shuffle=self.shuffle,
                prefetch=self.prefetch,
            )
        corpus, plan = self._rows(tokenizer, "train")
        rows = grain.MapDataset.range(len(plan)).map(
            lambda r: packing_lib.assemble(corpus, plan, int(r), self.seq_len)
        )
        return pipeline.training_batches(
            rows,
            batch_size=batch_size,
            seed=seed,
            shard=shard,
            epochs=self.epochs,
            shuffle=self.shuffle,
            prefetch=self.prefetch,
        )

    def evaluation(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """Every held-out row once, in order; the last batch is filled with zero-weight rows."""
        limit = None
        if self.lazy and max_batches is not None:
            limit = max_batches * batch_size * self.seq_len
        corpus, plan = self._rows(tokenizer, "held-out", limit)
        return pipeline.evaluation_batches(
            lambda r: packing_lib.assemble(corpus, plan, r, self.seq_len),
            len(plan),
            packing_lib.empty_row(self.seq_len),
            batch_size=batch_size,
            max_batches=max_batches,
            shard=shard,
        )

    def documents(self, part: str = "train") -> Source:
        """The raw documents of ``"train"`` or ``"held-out"``."""
        return self._parts[part]

    @functools.cached_property
    def _parts(self) -> dict[str, Source]:
        source = pipeline.limit(self._open(self.source), self.max_documents)
        pipeline.require(source, f"source {self.source!r}")
        if self.eval_source is not None:
            return {"train": source, "held-out": self._open(self.eval_source)}
        if len(source) == 1 and self.split_fraction and source[0].pieces:
            source = _cut(source, self.split_fraction)
            return dict(zip(("train", "held-out"), source))
        train, held = pipeline.split(
            source, self.split_fraction, self.split_seed, f"source {self.source!r}"
        )
        return {"train": train, "held-out": held}

    def _open(self, source: str | tuple[str, ...]) -> Source:
        names = [source] if isinstance(source, str) else list(source)
        return Concatenated([open_source(n, self.fields, self.separator) for n in names])

    @functools.cached_property
    def _cache(self) -> dict[Any, Any]:
        return {}

    def _encode(self, tokenizer: Tokenizer) -> functools.partial:
        return functools.partial(
            encode_document,
            tokenizer=tokenizer,
            completion_only=self.completion_only,
            add_bos=self.add_bos,
        )

    def _rows(
        self, tokenizer: Tokenizer, part: str, limit: int | None = None
    ) -> tuple[Tokenised, packing_lib.Plan]:
        """Tokens and plan of a part, made once per tokenizer."""
        key = (id(tokenizer), part, limit)
        if key not in self._cache:
            pipeline.require(self._parts[part], f"{part} part of {self.source!r}")
            corpus = tokenise(self._parts[part], self._encode(tokenizer), limit)
            plan = packing_lib.plan_rows(
                corpus.lengths, self.seq_len, self.packing, self.too_long, corpus.names
            )
            pipeline.require(plan, f"{part} part of {self.source!r} after too_long={self.too_long}")
            # The tokenizer is kept so that its id stays its own.
            self._cache[key] = (tokenizer, corpus, plan)
        return self._cache[key][1:]


def _cut(source: Source, fraction: float) -> tuple[Source, Source]:
    """Cuts the only document in two; its tail is held out."""
    text = "".join(piece for piece, _ in source[0].pieces)
    if not all(trainable for _, trainable in source[0].pieces):
        raise ConfigError(f"{source.name(0)}: one prompt and completion cannot be split")
    at = round(len(text) * (1 - fraction))
    at = text.find(" ", at) if text.find(" ", at) > 0 else at
    parts = (text[:at], text[at:])
    return tuple(
        InMemory([Document.plain(part)], [f"{source.name(0)} {end}"])
        for part, end in zip(parts, ("head", "tail"))
    )


def open_source(name: str, fields: Fields, separator: str | None = None) -> Source:
    """The documents of a named corpus, a file, a glob or a directory."""
    if name in CORPORA:
        return load_corpus(name)
    if not Path(name).suffix and not set(name) & set("/\\*?[~") and not Path(name).exists():
        raise ConfigError(unknown("corpus or file", name, CORPORA))
    return open_documents(find_files(name), fields, separator)
