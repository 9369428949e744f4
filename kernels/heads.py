"""Where the TPU kernels of attention find a block of tokens of a head, or of heads that share keys.

A TPU keeps the last two axes of an array in tiles of 8 x 128, so the order of axes decides what is
copied and how much is padding. Heads of whole lanes stay side by side, ``[B, T', N D]``, as a
projection leaves them. Other heads get tiles of their own, ``[B, K, R, T', D]``. A number per head
and token lies along the lanes, ``[B, N, n, 1, C]``: as a column each would take 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The blocks of one array ``[B, T, N, D]``.

    Args:
      batch, tokens: B and T.
      key_heads: K.
      repeats: R = N / K, query heads per key head.
      width: D.
      block: C, tokens per block.
      numbers: a number per head and token; D and R are 1.
    """

    batch: int
    tokens: int
    key_heads: int
    repeats: int = 1
    width: int
    block: int
    numbers: bool = False

    @property
    def count(self) -> int:
        """Blocks of a head."""
        return -(-self.tokens // self.block)

    @property
    def flat(self) -> bool:
        return self.width % 128 == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what :meth:`split` gives."""
        heads = self.key_heads * self.repeats
        if self.numbers:
            return self.batch, heads, self.count, 1, self.block
        if self.flat:
            return self.batch, max(self.tokens, self.block), heads * self.width
        return self.batch, self.key_heads, self.repeats, self.count * self.block, self.width

    def split(self, x: Array) -> Array:
        """From ``[B, T, N, D]``; what a block has behind the end is anything (see ``real``)."""
        if self.flat:
            x = x.reshape(*x.shape[:2], -1)
            return jnp.pad(x, ((0, 0), (0, self.shape[1] - self.tokens), (0, 0)))
        x = jnp.pad(x, ((0, 0), (0, -self.tokens % self.block), (0, 0), (0, 0)))
        if self.numbers:
            return x.transpose(0, 2, 3, 1).reshape(self.shape)
        x = x.reshape(self.batch, -1, self.key_heads, self.repeats, self.width)
        return x.transpose(0, 2, 3, 1, 4)

    def join(self, x: Array) -> Array:
        """The inverse of :meth:`split`."""
        heads = self.key_heads * self.repeats
        if self.numbers:
            x = x.reshape(self.batch, heads, 1, -1).transpose(0, 3, 1, 2)
        elif not self.flat:
            x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(self.batch, -1, heads, self.width)[:, : self.tokens]

    def one(self, at: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
        """Blocks ``[C, D]`` of one head for a grid; ``at`` maps a step (and prefetched scalars) to
        the batch, the key head and the block: number ``r count + i`` is block i of the r-th query
        head."""
        if not self.flat:
            block = None, None, None, self.block, self.width

            def place(*step: Any) -> tuple[Any, ...]:
                batch, head, number = at(*step)
                return batch, head, *self._query_head(number), 0

            return pl.BlockSpec(block, place)

        def columns(*step: Any) -> tuple[Any, ...]:
            batch, head, number = at(*step)
            r, block = self._query_head(number)
            return batch, block, head * self.repeats + r

        return pl.BlockSpec((None, self.block, self.width), columns)

    def group(self, at: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
        """Blocks of all heads that share keys, for :meth:`read` and :meth:`write`; ``at`` maps a
        step to the batch, the key head and the block."""
        if self.numbers:
            block = None, None, None, 1, self.block
            return pl.BlockSpec(block, lambda *step: (*at(*step), 0, 0))
        if self.flat:

            def columns(*step: Any) -> tuple[Any, ...]:
                batch, head, block = at(*step)
                return batch, block, head

            return pl.BlockSpec((None, self.block, self.repeats * self.width), columns)

        def place(*step: Any) -> tuple[Any, ...]:
            batch, head, block = at(*step)
            return batch, head, 0, block, 0

        return pl.BlockSpec((None, None, self.repeats, self.block, self.width), place)

    def real(self, x: Array, block: Any, axis: int = 0) -> Array:
        """``x`` of a block, zeros behind the end of the tokens, which lie along ``axis``."""
        if not self.flat or self.tokens % self.block == 0:
            return x
        _, block = self._query_head(block)
        token = block * self.block + lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(token < self.tokens, x, jnp.zeros_like(x))

    def read(self, ref: Any, block: Any) -> Array:
        """A block of :meth:`group` in float32, zeros behind the end: ``[R, C, D]``."""
        if self.numbers:
            row = ref[...].astype(jnp.float32)
            return jnp.sum(jnp.where(self._diagonal(), row, 0.0), axis=1, keepdims=True)[None]
        if not self.flat:
            return ref[...].astype(jnp.float32)
        heads = [ref[:, part].astype(jnp.float32) for part in self._columns()]
        return jnp.stack([self.real(x, block) for x in heads])

    def write(self, ref: Any, x: Array) -> None:
        """The inverse of :meth:`read`, in the dtype of ``ref``."""
        if self.numbers:
            row = jnp.sum(jnp.where(self._diagonal(), x[0], 0.0), axis=0, keepdims=True)
            ref[...] = row.astype(ref.dtype)
        elif self.flat:
            for part, head in zip(self._columns(), x):
                ref[:, part] = head.astype(ref.dtype)
        else:
            ref[...] = x.astype(ref.dtype)

    def _query_head(self, number: Any) -> tuple[Any, Any]:
        """``(r, i)`` of number ``r count + i``."""
        if self.repeats == 1:
            return 0, number
        count = jnp.array(self.count, number.dtype)
        return lax.div(number, count), lax.rem(number, count)

    def _columns(self) -> list[slice]:
        return [slice(r * self.width, (r + 1) * self.width) for r in range(self.repeats)]

    def _diagonal(self) -> Array:
        """What turns a column into a row and back, exactly."""
        iota = lambda axis: lax.broadcasted_iota(jnp.int32, (self.block, self.block), axis)
        return iota(0) == iota(1)
