"""The grain pipelines that every kind of data shares: shuffle, repeat, shard, batch, pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError
from flora_jax.data.documents import InMemory, Source, Subset
from flora_jax.data.packing import Batch

Shard = tuple[int, int]


def mix_seed(seed: int) -> int:
    """A 32-bit seed; neighbouring seeds give unrelated streams.

    grain shuffles epoch e with ``seed + e``: without mixing, seed 1 would replay the second epoch
    of seed 0.
    """
    if seed < 0:
        raise ConfigError(f"seed must not be negative, got {seed}")
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def local_batch(batch_size: int, shard: Shard) -> int:
    """Rows of the global batch that one of the shards reads; checks both arguments."""
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"shard must be (index, count) with 0 <= index < count, got {shard}")
    if batch_size < 1 or batch_size % count:
        raise ConfigError(f"batch_size={batch_size} must be a positive multiple of {count} shards")
    return batch_size // count


def training_batches(
    examples: grain.MapDataset,
    *,
    batch_size: int,
    seed: int,
    shard: Shard = (0, 1),
    epochs: int | None = None,
    shuffle: bool = True,
    augment: Callable[[Any, np.random.Generator], Any] | None = None,
    prefetch: int = 0,
) -> grain.IterDataset:
    """Shuffled, repeated, sharded batches.

    The k-th global batch is the same set of examples whatever the number of shards: shard i of n
    reads every n-th example of the shuffled stream. Batches run on across epochs; with ``epochs``
    given, the last incomplete global batch is dropped.

    Args:
        examples: one example per index.
        batch_size: examples in the global batch, over all shards.
        seed: of the order and of the augmentation.
        shard: index of this process and number of processes.
        epochs: passes over the data; None repeats for ever.
        shuffle: a new order every epoch.
        augment: ``(example, rng) -> example`` with grain's per-example generator.
        prefetch: reading threads; 0 reads in the caller's.
    """
    local = local_batch(batch_size, shard)
    seed = mix_seed(seed)
    data = examples.seed(seed)
    if shuffle:
        data = data.shuffle(seed)
    if epochs is not None and len(data) * epochs < batch_size:
        raise ConfigError(
            f"{len(data)} examples in {epochs} epochs do not fill one batch of {batch_size}"
        )
    data = data.repeat(epochs)
    if augment is not None:
        data = data.random_map(augment)
    if epochs is not None:
        data = data[: len(data) // batch_size * batch_size]
    data = data[shard[0] :: shard[1]].batch(local, drop_remainder=True)
    return data.to_iter_dataset(read_options(prefetch))


def read_options(prefetch: int) -> grain.ReadOptions:
    """grain's reading options for ``prefetch`` threads (0: none)."""
    if prefetch < 0:
        raise ConfigError(f"prefetch must not be negative, got {prefetch}")
    return grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=4 * prefetch)


def evaluation_batches(
    get: Callable[[int], Batch],
    count: int,
    empty: Batch,
    *,
    batch_size: int,
    max_batches: int | None = None,
    shard: Shard = (0, 1),
) -> grain.MapDataset:
    """Every example once, in order, the last batch filled up with rows of weight zero.

    All shards see the same number of batches. The result has a length, random access and can be
    iterated over any number of times.
    """
    local = local_batch(batch_size, shard)
    batches = -(-count // batch_size)
    if max_batches is not None:
        batches = min(batches, max_batches)
    rows = grain.MapDataset.range(shard[0], batches * batch_size, shard[1])
    return _Evaluation(rows.map(lambda i: get(int(i)) if i < count else empty).batch(local))


class _Evaluation(grain.MapDataset):
    """Iterates one batch at a time; grain's default reads 500 ahead, too many for large images."""

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: int | slice) -> Any:
        return self.slice(index) if isinstance(index, slice) else self.parents[0][index]

    def __iter__(self) -> grain.DatasetIterator:
        return iter(self.to_iter_dataset(read_options(0)))


def split(source: Source, fraction: float, seed: int, what: str) -> tuple[Source, Source]:
    """Splits a source into training and held-out items by a seeded permutation.

    At least one item goes to each side when ``fraction`` is not zero.
    """
    check_fraction(fraction)
    n = len(source)
    if fraction == 0:
        return source, InMemory([])
    if n < 2:
        raise ConfigError(f"{what}: {n} item cannot be split into training and held-out data")
    held = min(max(1, round(fraction * n)), n - 1)
    order = np.random.default_rng(seed).permutation(n)
    return Subset(source, np.sort(order[held:])), Subset(source, np.sort(order[:held]))


def check_fraction(fraction: float) -> None:
    """Raises ConfigError unless a share to hold out is in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"split_fraction must be in [0, 1), got {fraction}")


def limit(source: Source, count: int | None) -> Source:
    """The first ``count`` items of a source."""
    if count is None or count >= len(source):
        return source
    if count < 1:
        raise ConfigError(f"the number of documents must be positive, got {count}")
    return Subset(source, np.arange(count))


def require(items: Sequence[Any], what: str) -> None:
    """Raises ConfigError if there is nothing."""
    if not len(items):
        raise ConfigError(f"{what}: no data")
