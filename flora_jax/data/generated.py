"""Data that is made, not read: what every synthetic task shares."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from flora_jax.data import pipeline
from flora_jax.data.packing import Batch

ENDLESS = 2**62


class Generated:
    """A task that draws its examples; subclasses are dataclasses with the two fields below.

    Attributes:
        eval_size: held-out examples.
        task_seed: of the task itself and of the held-out examples.
    """

    eval_size: int
    task_seed: int

    def _sample(self, rng: np.random.Generator, count: int) -> Batch:
        """``count`` fresh examples."""
        raise NotImplementedError

    def train(
        self,
        tokenizer: Any = None,
        batch_size: int = 64,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Endless fresh batches, of which a shard takes every n-th row; no tokenizer is used."""
        pipeline.local_batch(batch_size, shard)
        mixed = pipeline.mix_seed(seed)

        def batch(index: int) -> Batch:
            rows = self._sample(np.random.default_rng([mixed, int(index)]), batch_size)
            return {name: x[shard[0] :: shard[1]] for name, x in rows.items()}

        data = grain.MapDataset.range(ENDLESS).map(batch)
        return data.to_iter_dataset(pipeline.read_options(0))

    def evaluation(
        self,
        tokenizer: Any = None,
        batch_size: int = 256,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """The same ``eval_size`` examples at every call."""
        rows = self._sample(np.random.default_rng([self.task_seed, 2]), self.eval_size)
        return array_evaluation(rows, batch_size, max_batches, shard)


def array_evaluation(
    rows: Batch, batch_size: int, max_batches: int | None, shard: pipeline.Shard
) -> grain.MapDataset:
    """Evaluation batches of arrays [N, ...]; rows of zeros, weight included, fill the last one."""
    return pipeline.evaluation_batches(
        lambda i: {name: value[i] for name, value in rows.items()},
        len(next(iter(rows.values()))),
        {name: np.zeros_like(value[0]) for name, value in rows.items()},
        batch_size=batch_size,
        max_batches=max_batches,
        shard=shard,
    )
