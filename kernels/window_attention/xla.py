"""Blocks of queries, each with its own keys and those of the window before: O(T window)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.window_attention.reference import MASKED, NOBODY, Marks, seen

BLOCK = 64
"""Queries of a block, at least."""


def xla(
    q: Array,
    k: Array,
    v: Array,
    marks: Marks,
    *,
    window: int,
    scale: float,
    block: int | None = None,
) -> tuple[Array, Array, Array]:
    """The results of the op, differentiated by jax; ``block`` is of the TPU kernels."""
    batch, length, heads, dim = q.shape
    key_heads = k.shape[2]
    if marks is None:
        marks = tuple(jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    before = min(window, k.shape[1])
    size = min(length, max(BLOCK, before))
    if k.shape[1] == size:
        before = 0
    mine, theirs = marks[0], _with_before(marks[1], before, length, NOBODY)
    k, v = (_with_before(x, before, length, 0) for x in (k, v))
    count = -(-length // size)
    pad = count * size - length

    def queries(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, count, size, *x.shape[2:])

    def keys(x: Array) -> Array:
        own, tail = queries(x[:, before:]), x[:, None, :before]
        if count > 1:
            tail = jnp.concatenate([tail, own[:, :-1, size - before :]], axis=1)
        return jnp.concatenate([tail, own], axis=2)

    gap = before + jnp.arange(size)[:, None] - jnp.arange(before + size)
    near = ((gap >= 0) & (gap < window)) & seen((queries(mine), keys(theirs)))
    blocks = queries(q * scale).reshape(batch, count, size, key_heads, heads // key_heads, dim)
    scores = jnp.einsum("bcikgd,bcjkd->bckgij", blocks, keys(k), preferred_element_type=jnp.float32)
    scores = jnp.where(near[:, :, None, None], scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(top > MASKED / 2, jnp.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum(
        "bckgij,bcjkd->bckgid", weights.astype(v.dtype), keys(v),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 4, 2).reshape(batch, count * size, heads, -1)
        return x[:, :length]

    return join((out / total).astype(q.dtype)), join(lse)[..., 0], join(top)[..., 0]


def _with_before(x: Array, before: int, length: int, value: int) -> Array:
    """``x [B, S, ...]`` with exactly ``before`` places in front of the last ``length``."""
    missing = before + length - x.shape[1]
    if missing <= 0:
        return x[:, -missing:]
    fill = [(0, 0), (missing, 0), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, fill, constant_values=value)
