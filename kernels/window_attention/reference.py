"""The specification: all pairs, masked, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that may not be seen: finite, so that a row without keys gives no NaN."""
SHARED, NOBODY = -1, -(2**31)
"""Marks of a key that all queries see, and of a place without a key."""
Marks = tuple[Array, Array] | None
"""int32 ``[B, T]`` of queries and ``[B, S]`` of keys: equal marks see each other."""


def seen(marks: Marks) -> Array | bool:
    """Which keys a query may see for their marks, ``[B, T, S]``."""
    if marks is None:
        return True
    mine, theirs = marks[0][..., :, None], marks[1][..., None, :]
    return (mine == theirs) | (theirs == SHARED)


def reference(
    q: Array,
    k: Array,
    v: Array,
    marks: Marks,
    *,
    window: int,
    scale: float,
    block: int | None = None,
) -> tuple[Array, Array, Array]:
    """The results of the op; query i stands at key ``S - T + i``. ``block``: of the TPU kernels."""
    batch, length, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    gap = keys - length + jnp.arange(length)[:, None] - jnp.arange(keys)
    near = ((gap >= 0) & (gap < window))[None] & seen(marks)
    f32 = lambda x: x.astype(jnp.float32)
    grouped = f32(q).reshape(batch, length, key_heads, heads // key_heads, dim)
    s = scale * jnp.einsum("btkgd,bskd->bkgts", grouped, f32(k), precision="highest")
    s = jnp.where(near[:, None, None], s, MASKED)
    top = s.max(axis=-1, keepdims=True)
    p = jnp.where(near[:, None, None], jnp.exp(s - top), 0)
    total = p.sum(axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1)
    o = jnp.einsum("bkgts,bskd->btkgd", p, f32(v), precision="highest")
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    rows = lambda x: jnp.moveaxis(x[..., 0], 3, 1).reshape(batch, length, heads)
    o = o.reshape(batch, length, heads, -1).astype(q.dtype)
    return o, rows(lse), jax.lax.stop_gradient(rows(top))
