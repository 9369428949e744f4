"""Where the TPU kernels find a block of tokens of one head.

A TPU keeps the last two axes of an array in tiles, so the order of axes decides what is copied.
Heads of whole lanes stay side by side, ``[B, T', N H]``, as a projection leaves them; other heads
get tiles of their own, ``[B, K, R T', H]``, with the R query heads of a key head in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from flora_jax.kernels.block_sparse_attention.layout import Shape, by_head, by_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The blocks of one array ``[B, T, N, H]``.

    Args:
      batch, tokens: B and T.
      key_heads: K.
      repeats: R = N / K, query heads per key head.
      width: H.
      block: tokens per block.
    """

    batch: int
    tokens: int
    key_heads: int
    repeats: int
    width: int
    block: int

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
        if self.flat:
            heads = self.key_heads * self.repeats
            return self.batch, max(self.tokens, self.block), heads * self.width
        return self.batch, self.key_heads, self.repeats * self.count * self.block, self.width

    def split(self, x: Array) -> Array:
        """From ``[B, T, N, H]``; what a block has behind the end is anything (see ``real``)."""
        if self.flat:
            x = x.reshape(*x.shape[:2], -1)
            return jnp.pad(x, ((0, 0), (0, self.shape[1] - self.tokens), (0, 0)))
        return by_head(x, self.block).reshape(self.shape)

    def join(self, x: Array) -> Array:
        """The inverse of :meth:`split`."""
        heads = self.key_heads * self.repeats
        if self.flat:
            return x[:, : self.tokens].reshape(self.batch, -1, heads, self.width)
        return by_token(x.reshape(self.batch, heads, -1, self.width), self.tokens)

    def spec(self, at: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
        """Blocks for a grid; ``at`` maps a step and the prefetched scalars to the batch, the key
        head and the block: number ``r count + i`` is block i of the r-th query head."""
        if self.flat:
            return pl.BlockSpec((None, self.block, self.width), lambda *x: self._place(*at(*x)))
        block = None, None, self.block, self.width
        return pl.BlockSpec(block, lambda *step: (*at(*step), 0))

    def real(self, x: Array, block: Any, axis: int = 0) -> Array:
        """``x`` of a block, zeros behind the end of the tokens, which lie along ``axis``."""
        if self.tokens % self.block == 0:
            return x
        if self.repeats > 1:
            block = lax.rem(block, jnp.array(self.count, block.dtype))
        token = block * self.block + lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(token < self.tokens, x, jnp.zeros_like(x))

    def _place(self, batch: Any, head: Any, block: Any) -> tuple[Any, Any, Any]:
        if self.repeats == 1:
            return batch, block, head
        count = jnp.array(self.count, block.dtype)
        head = head * self.repeats + lax.div(block, count)
        return batch, lax.rem(block, count), head


def queries(shape: Shape) -> Heads:
    """Of q, o and their gradients."""
    return Heads(
        batch=shape.batch, tokens=shape.queries, key_heads=shape.key_heads, repeats=shape.repeats,
        width=shape.width, block=shape.block_q,
    )  # fmt: skip


def keys(shape: Shape) -> Heads:
    """Of k, v and their gradients."""
    return Heads(
        batch=shape.batch, tokens=shape.keys, key_heads=shape.key_heads, repeats=1,
        width=shape.width, block=shape.block_k,
    )  # fmt: skip
