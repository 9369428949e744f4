"""The arithmetic of one tile: 128 queries of the heads that share keys, and all keys they see.

Scores are ``[keys, G x 128]`` in base 2; numbers per query are rows ``[1, G x 128]`` in a tile and
``[G, 128]`` outside. Products take operands of the arguments' dtype and sum in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.window_attention.reference import MASKED, SHARED

TILE = 128
LOG2E = math.log2(math.e)


def _dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """What is static of the tiles of one call.

    Args:
      window: keys that a query sees.
      halo: keys before the first query of a tile, at least ``window - 1``.
      group: G, query heads that share keys.
      scale: of the scores.
    """

    window: int
    halo: int
    group: int
    scale: float

    def cut(
        self, at: int, q: Array, k: Array, v: Array, marks: tuple[Array, ...], first: Any
    ) -> tuple[Array, Array, Array, Array]:
        """The tile of the queries from ``at`` on: ``q [G 128, D]``, ``k, v [halo + 128, D]`` and
        which keys are seen, ``[halo + 128, G 128]``.

        Args:
          q: ``[G, C, D]``, of a block.
          k, v: ``[halo + C, D]``.
          marks: rows ``[1, C]`` of queries and ``[1, halo + C]`` of keys, or nothing.
          first: place of the block's first query.
        """
        here, near = slice(at, at + TILE), slice(at, at + TILE + self.halo)
        shape = self.halo + TILE, TILE
        key, query = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        gap = query + self.halo - key
        seen = jnp.where((gap >= 0) & (gap < self.window), 1, 0)
        if at < self.halo:
            seen = jnp.where(first + at - self.halo + key >= 0, seen, 0)
        if marks:
            mine, theirs = marks[0][:, here], _column(marks[1][:, near])
            seen = jnp.where((mine == theirs) | (theirs == SHARED), seen, 0)
        seen = jnp.concatenate([seen] * self.group, axis=1)
        return self._stack(q[:, here]), k[near], v[near], seen

    def forward(self, q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        """``o [G, 128, V]`` and the rows ``lse, top [G, 128]``, float32."""
        p, total, top = self._weights(q, k, seen)
        o = _dot(p.astype(v.dtype), v, (0, 0))
        some = total > 0
        lse = top / LOG2E + jnp.log(jnp.where(some, total, 1.0))
        lse, top = jnp.where(some, lse, -jnp.inf), jnp.where(some, top / LOG2E, MASKED)
        return o.reshape(self.group, TILE, -1), self._rows(lse), self._rows(top)

    def backward(
        self, q: Array, k: Array, v: Array, seen: Array, do: Array, dlse: Array
    ) -> tuple[Array, Array, Array]:
        """``dq [G, 128, D]``, ``dk [halo + 128, D]`` and ``dv [halo + 128, V]``, float32.

        Args:
          do: ``[G, 128, V]``.
          dlse: ``[G, 128]``.
        """
        p, total, _ = self._weights(q, k, seen)
        do, dlse = self._stack(do), jnp.where(total > 0, self._row(dlse), 0.0)
        dp = _dot(v, do, (1, 1))
        mean = jnp.sum(p * dp, axis=0, keepdims=True)
        ds = (p * (dp - mean + dlse) * self.scale).astype(q.dtype)
        dq = _dot(ds, k, (0, 0)).reshape(self.group, TILE, -1)
        return dq, _dot(ds, q, (1, 0)), _dot(p.astype(v.dtype), do, (1, 0))

    def _weights(self, q: Array, k: Array, seen: Array) -> tuple[Array, Array, Array]:
        """Softmax weights, the sum before they were normalised and the largest base-2 score."""
        s = jnp.where(seen > 0, _dot(k, q, (1, 1)) * (self.scale * LOG2E), MASKED)
        top = jnp.max(s, axis=0, keepdims=True)
        p = jnp.where(seen > 0, jnp.exp2(s - top), 0.0)
        total = jnp.sum(p, axis=0, keepdims=True)
        return p / jnp.where(total > 0, total, 1.0), total, top

    def _stack(self, x: Array) -> Array:
        """``[G, 128, D] -> [G 128, D]``."""
        return x.reshape(-1, x.shape[2])

    def _rows(self, x: Array) -> Array:
        """``[1, G 128] -> [G, 128]``."""
        return jnp.concatenate([x[:, i * TILE : (i + 1) * TILE] for i in range(self.group)])

    def _row(self, x: Array) -> Array:
        return jnp.concatenate([x[i : i + 1] for i in range(self.group)], axis=1)


def _column(row: Array) -> Array:
    """``[1, n] -> [n, 1]``, exactly, at most 128 at a time."""

    def one(part: Array) -> Array:
        size = part.shape[1]
        i, j = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        return jnp.sum(jnp.where(i == j, part, 0), axis=1, keepdims=True)

    parts = [row[:, at : at + 128] for at in range(0, row.shape[1], 128)]
    return jnp.concatenate([one(part) for part in parts])
