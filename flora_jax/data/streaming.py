"""The lazy language-model pipeline: documents are read, tokenised and packed while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from grain import experimental

from flora_jax.core.errors import ConfigError
from flora_jax.data import pipeline
from flora_jax.data.documents import Document, Source
from flora_jax.data.packing import Batch, plan_rows, shifted

Encode = Callable[[Document, str], tuple[np.ndarray, np.ndarray]]


def stream(
    source: Source,
    encode: Encode,
    *,
    seq_len: int,
    packing: str,
    too_long: str,
    batch_size: int,
    seed: int,
    shard: pipeline.Shard = (0, 1),
    epochs: int | None = None,
    shuffle: bool = True,
    prefetch: int = 0,
) -> grain.IterDataset:
    """Batches of rows packed on the fly from shuffled documents; each shard packs its own.

    Args:
        source: the documents.
        encode: ``(document, name) -> (tokens, trainable)``.
        seq_len, packing, too_long: see ``packing.plan_rows``.
        batch_size, seed, shard, epochs, shuffle, prefetch: see ``pipeline.training_batches``.
    """
    local = pipeline.local_batch(batch_size, shard)
    seed = pipeline.mix_seed(seed)
    if len(source) < shard[1]:
        raise ConfigError(f"{len(source)} documents are not enough for {shard[1]} shards")
    order = grain.MapDataset.range(len(source))
    order = (order.shuffle(seed) if shuffle else order).repeat(epochs)

    def pieces(index: int) -> list[Batch]:
        name = source.name(int(index))
        whole = shifted(*encode(source[int(index)], name))
        n = len(whole["tokens"])
        if packing == "concat" and too_long == "split":
            return [whole] if n else []  # Row boundaries alone decide where it is cut.
        plan = plan_rows(np.array([n]), seq_len, "none", too_long, [name])
        spans = [slice(s, s + size) for s, size in zip(plan.start, plan.length)]
        return [{key: value[span] for key, value in whole.items()} for span in spans]

    # Documents without any text would be searched for ever.
    if not any(pieces(index) for index in range(len(source))):
        raise ConfigError(f"{len(source)} documents and no data in them (too_long={too_long})")
    rows = order[shard[0] :: shard[1]].map(pieces)
    rows = rows.to_iter_dataset(pipeline.read_options(prefetch))
    rows = experimental.FlatMapIterDataset(rows, _Flatten())
    struct = dict.fromkeys(("tokens", "targets", "loss_mask"), seq_len)
    if packing == "concat":
        rows = _JsonState(experimental.ConcatThenSplitIterDataset(rows, length_struct=struct))
    else:
        alone = packing == "none"
        rows = experimental.FirstFitPackIterDataset(
            rows,
            length_struct=struct,
            num_packing_bins=1 if alone else 64,
            seed=seed,
            shuffle_bins=shuffle,
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
