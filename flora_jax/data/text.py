"""Language-model data: sources, tokens, rows, batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from grain import experimental

from flora_jax.core.errors import ConfigError, FormatError, unknown
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
from flora_jax.data.packing import Batch, Tokenised


class Tokenizer(Protocol):
    """What the pipelines ask of a tokenizer.

    ``encode`` adds no special tokens. ``apply_chat`` (only for chat data) renders messages to a
    string or to ``(text, trainable)`` pieces.
    """

    eos_id: int

    def encode(self, text: str) -> Sequence[int]: ...


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
            several of them. ``.jsonl``, ``.json``, ``.parquet`` and ``.tsv`` hold records, any
            other file is one document of plain text.
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
            return self._stream(tokenizer, batch_size, seed, shard)
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

    def _rows(
        self, tokenizer: Tokenizer, part: str, limit: int | None = None
    ) -> tuple[Tokenised, packing_lib.Plan]:
        """Tokens and plan of a part, made once per tokenizer."""
        key = (id(tokenizer), part, limit)
        if key not in self._cache:
            pipeline.require(self._parts[part], f"{part} part of {self.source!r}")
            corpus = tokenise(self, self._parts[part], tokenizer, limit)
            plan = packing_lib.plan_rows(
                corpus.lengths, self.seq_len, self.packing, self.too_long, corpus.names
            )
            pipeline.require(plan, f"{part} part of {self.source!r} after too_long={self.too_long}")
            # The tokenizer is kept so that its id stays its own.
            self._cache[key] = (tokenizer, corpus, plan)
        return self._cache[key][1:]

    def _stream(
        self, tokenizer: Tokenizer, batch_size: int, seed: int, shard: pipeline.Shard
    ) -> grain.IterDataset:
        """Documents are shuffled and sharded; each process tokenises and packs its own."""
        local = pipeline.local_batch(batch_size, shard)
        source, seed = self._parts["train"], pipeline.mix_seed(seed)
        if len(source) < shard[1]:
            raise ConfigError(f"{len(source)} documents for {shard[1]} shards in {self.source!r}")
        order = grain.MapDataset.range(len(source))
        order = (order.shuffle(seed) if self.shuffle else order).repeat(self.epochs)

        def pieces(index: int) -> list[Batch]:
            document = encode_document(self, source[int(index)], tokenizer, source.name(int(index)))
            return _pieces(self, *document, source.name(int(index)))

        rows = order[shard[0] :: shard[1]].map(pieces)
        rows = rows.to_iter_dataset(pipeline.read_options(self.prefetch))
        rows = experimental.FlatMapIterDataset(rows, _Flatten())
        struct = dict.fromkeys(("tokens", "targets", "loss_mask"), self.seq_len)
        if self.packing == "concat":
            rows = _JsonState(experimental.ConcatThenSplitIterDataset(rows, length_struct=struct))
        else:
            alone = self.packing == "none"
            rows = experimental.FirstFitPackIterDataset(
                rows,
                length_struct=struct,
                num_packing_bins=1 if alone else 64,
                seed=seed,
                shuffle_bins=self.shuffle,
                max_sequences_per_bin=1 if alone else None,
            )
        return rows.map(_named).batch(local, drop_remainder=True)


class _Flatten(experimental.FlatMapTransform):
    max_fan_out = 1 << 31

    def flat_map(self, element: list[Batch]) -> list[Batch]:
        return element


class _JsonState(grain.IterDataset):
    """Lets grain's concat-then-split resume from a state that went through JSON.

    Checkpoints write the state as JSON, which turns tuples into lists; grain 0.2.18 compares its
    ``remainder_slices`` with a tuple and then takes "no remainder" for one.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonStateIterator(iter(self.parents[0]))


class _JsonStateIterator(grain.DatasetIterator):
    def __init__(self, packer: grain.DatasetIterator):
        super().__init__(packer)
        self._packer = packer

    def __next__(self) -> Any:
        return next(self._packer)

    def get_state(self) -> dict[str, Any]:
        return self._packer.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {name: tuple(span) for name, span in state["remainder_slices"].items()}
        self._packer.set_state(state | {"remainder_slices": slices})


def _named(row: Mapping[str, np.ndarray]) -> Batch:
    out = {name: row[name] for name in ("tokens", "targets", "loss_mask")}
    for name in ("positions", "segment_ids"):
        out[name] = row[f"tokens_{name}"].astype(np.int32)
    return out


def _pieces(data: TextData, tokens: np.ndarray, trainable: np.ndarray, name: str) -> list[Batch]:
    """The pieces of one document in the lazy pipeline, shifted before they are cut."""
    whole = packing_lib.shifted(tokens, trainable)
    if data.packing == "concat" and data.too_long == "split":
        return [whole] if len(tokens) else []  # Row boundaries alone decide where it is cut.
    lengths = np.array([len(tokens)])
    plan = packing_lib.plan_rows(lengths, data.seq_len, "none", data.too_long, [name])
    spans = [slice(s, s + n) for s, n in zip(plan.start, plan.length)]
    return [{key: value[span] for key, value in whole.items()} for span in spans]


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


def render(document: Document, tokenizer: Any, where: str) -> Iterable[tuple[str, bool]]:
    """The ``(text, trainable)`` pieces of a document; chats go through the tokenizer's template.

    If ``apply_chat`` gives one string, the part that each assistant message adds to what came
    before is the trainable one, and the template must only ever append.
    """
    if not document.messages:
        return document.pieces
    if not hasattr(tokenizer, "apply_chat"):
        raise ConfigError(f"{where}: chat messages need a tokenizer with apply_chat")
    messages = [dict(m) for m in document.messages]
    text = tokenizer.apply_chat(messages)
    if not isinstance(text, str):
        return text
    pieces, before = [], ""
    for k, message in enumerate(messages):
        after = text if k + 1 == len(messages) else tokenizer.apply_chat(messages[: k + 1])
        if not after.startswith(before):
            raise FormatError(f"{where}: the chat template rewrites earlier messages (message {k})")
        pieces.append((after[len(before) :], message["role"] == "assistant"))
        before = after
    return pieces


def encode_document(
    data: TextData, document: Document, tokenizer: Tokenizer, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and trainable bool [n] of a document, eos at its end; n = 0 if no text."""
    tokens: list[int] = []
    trainable: list[bool] = []
    for text, train in render(document, tokenizer, where):
        ids = tokenizer.encode(text)
        tokens += ids
        trainable += [train or not data.completion_only] * len(ids)
    if not tokens:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    if data.add_bos:
        if getattr(tokenizer, "bos_id", None) is None:
            raise ConfigError("add_bos=True, but the tokenizer has no bos_id")
        tokens.insert(0, tokenizer.bos_id)
        trainable.insert(0, False)
    tokens.append(tokenizer.eos_id)
    trainable.append(trainable[-1])
    return np.asarray(tokens, np.int32), np.asarray(trainable, bool)


def tokenise(
    data: TextData, source: Source, tokenizer: Tokenizer, limit: int | None = None
) -> Tokenised:
    """Encodes documents until ``limit`` tokens are reached; documents without text are left out."""
    encoded, names, total = [], [], 0
    for k in range(len(source)):
        if limit is not None and total >= limit:
            break
        tokens, trainable = encode_document(data, source[k], tokenizer, source.name(k))
        if len(tokens):
            encoded.append((tokens, trainable))
            names.append(source.name(k))
            total += len(tokens)
    return Tokenised.join(encoded, names)
