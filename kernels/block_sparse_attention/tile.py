"""The arithmetic of one tile, the same on every device.

Scores are in base 2: ``s = q k (scale log2 e)``, so that ``exp2`` of them is the exponential.
A kernel lays queries along either axis of a tile; ``Rows`` says how a number per query meets it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

LOG2E = math.log2(math.e)
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of what does not count: finite, so that no difference of two is NaN."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers per query beside a tile.

    Args:
      axis: the tile's axis of keys.
      keep: they keep that axis, with size 1 (TPU), or lose it (GPU).
    """

    axis: int
    keep: bool

    def reduce(self, op: Callable[..., Array], tile: Array) -> Array:
        """``op`` (``jnp.max`` or ``jnp.sum``) over the keys."""
        return op(tile, axis=self.axis, keepdims=True) if self.keep else op(tile, axis=self.axis)

    def spread(self, rows: Array, tile: Array) -> Array:
        """The numbers along the keys."""
        if self.keep:
            return rows
        return jax.lax.broadcast_in_dim(rows, tile.shape, [1 - self.axis])


def softmax_step(s: Array, top: Array, total: Array, rows: Rows) -> tuple[Array, ...]:
    """One step of the online softmax.

    Args:
      s: base-2 scores of new keys, float32.
      top: the largest score so far, per query.
      total: the sum of ``exp2(s - top)`` so far.

    Returns:
      ``(p, decay, top, total)``: weights of the new keys, what to multiply the weighted sum so far
      with, and the new statistics.
    """
    new = jnp.maximum(top, rows.reduce(jnp.max, s))
    decay = jnp.exp2(top - new)
    p = jnp.exp2(s - rows.spread(new, s))
    return p, decay, new, total * decay + rows.reduce(jnp.sum, p)


def log_sum(top: Array, total: Array) -> Array:
    """Natural log of the softmax's sum."""
    return top / LOG2E + jnp.log(total)


def weights(s: Array, lse2: Array, rows: Rows) -> Array:
    """Of a tile of base-2 scores; ``lse2``: base-2 log of the softmax's sum, per query."""
    return jnp.exp2(s - rows.spread(lse2, s))


def score_gradient(p: Array, dp: Array, terms: Array, rows: Rows) -> Array:
    """The gradient of ``scale q k``, of a tile.

    Args:
      p: weights.
      dp: ``do v``.
      terms: ``rowsum(o do) - dlse``, per query.
    """
    return p * (dp - rows.spread(terms, dp))
