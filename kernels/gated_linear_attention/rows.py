"""Where the TPU kernels find a chunk's rows of each head.

A TPU keeps the last two axes of an array in tiles of 8 x 128, so the order of axes decides what is
copied and how much is padding. Heads of whole lanes stay side by side, ``[B, T', N D]``, as a
projection leaves them: a block is the columns of the heads that share keys. Other heads get tiles
of their own, ``[B, H, N/H, T', D]``. A number per head and token lies along the lanes,
``[B, H, n, 1, C]``: as a column each would take 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one array ``[B, T, N, D]``.

    Args:
      batch, length: B and T.
      heads: of keys, H.
      group: query heads that share keys, N / H.
      dim: D.
      chunk: C.
      numbers: a number per head and token; D and N / H are 1.
    """

    batch: int
    length: int
    heads: int
    group: int
    dim: int
    chunk: int
    numbers: bool = False

    @property
    def count(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def flat(self) -> bool:
        return self.dim % 128 == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what :meth:`split` gives."""
        padded = self.count * self.chunk
        if self.numbers:
            return self.batch, self.heads, self.count, 1, self.chunk
        if self.flat:
            return self.batch, padded, self.heads * self.group * self.dim
        return self.batch, self.heads, self.group, padded, self.dim

    def split(self, x: jax.Array) -> jax.Array:
        """From ``[B, T, N, D]``, with zeros behind the end."""
        x = jnp.pad(x, ((0, 0), (0, -self.length % self.chunk), (0, 0), (0, 0)))
        if self.numbers:
            return x.transpose(0, 2, 3, 1).reshape(self.shape)
        if self.flat:
            return x.reshape(self.shape)
        x = x.reshape(self.batch, -1, self.heads, self.group, self.dim)
        return x.transpose(0, 2, 3, 1, 4)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`split`."""
        if self.numbers:
            x = x.reshape(self.batch, self.heads, 1, -1).transpose(0, 3, 1, 2)
        elif not self.flat:
            x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(self.batch, -1, self.heads * self.group, self.dim)[:, : self.length]

    def spec(self, at: Callable[[Any], Any]) -> pl.BlockSpec:
        """A chunk's block for a grid of ``(batch, head, chunk)``; ``at`` maps a step to a chunk."""
        if self.numbers:
            return pl.BlockSpec((1, 1, 1, 1, self.chunk), lambda b, h, c: (b, h, at(c), 0, 0))
        if self.flat:
            wide = self.group * self.dim
            return pl.BlockSpec((1, self.chunk, wide), lambda b, h, c: (b, at(c), h))
        block = 1, 1, self.group, self.chunk, self.dim
        return pl.BlockSpec(block, lambda b, h, c: (b, h, 0, at(c), 0))

    def read(self, ref: Any) -> jax.Array:
        """A block in float32: ``[G, C, D]``."""
        if self.numbers:
            row = ref[0, 0, 0].astype(jnp.float32)
            return jnp.sum(jnp.where(self._diagonal(), row, 0.0), axis=1, keepdims=True)[None]
        if self.flat:
            return jnp.stack([ref[0, :, part].astype(jnp.float32) for part in self._columns()])
        return ref[0, 0].astype(jnp.float32)

    def write(self, ref: Any, x: jax.Array) -> None:
        """The inverse of :meth:`read`, in the dtype of ``ref``."""
        if self.numbers:
            row = jnp.sum(jnp.where(self._diagonal(), x[0], 0.0), axis=0, keepdims=True)
            ref[0, 0, 0] = row.astype(ref.dtype)
        elif self.flat:
            for part, head in zip(self._columns(), x):
                ref[0, :, part] = head.astype(ref.dtype)
        else:
            ref[0, 0] = x.astype(ref.dtype)

    def _columns(self) -> list[slice]:
        return [slice(i * self.dim, (i + 1) * self.dim) for i in range(self.group)]

    def _diagonal(self) -> jax.Array:
        """What turns a column into a row and back, exactly."""
        iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (self.chunk, self.chunk), axis)
        return iota(0) == iota(1)
