"""Exact softmax over a window of the last keys, in blocks: O(T w) time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flora_jax.attention.cache import ring_positions
from flora_jax.attention.masks import Sliding, visible

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that may not be seen: finite, so that a row without keys gives no NaN."""
BLOCK = 64


def windowed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    *,
    there: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``sum_j e^(s_ij - m_i) v_j``, ``sum_j e^(s_ij - m_i)`` and ``m_i``, ``0 <= i - j < window``.

    Args:
      q: ``[B, T, N, H]``.
      k, v: ``[B, W + T, K, H]``: the W keys before these queries, then their own; W at least
        ``min(window, T) - 1``. ``m_i`` is the largest score that query i sees.
      there: ``[B, W + T]``, false where there is no key.
      q_segments, k_segments: ``[B, T]`` and ``[B, W + T]``.
      scale: of the scores, by default ``H ** -0.5``.

    Returns:
      ``[B, T, N, H]``, ``[B, T, N]`` and ``[B, T, N]`` in float32; zero sums without a key.
    """
    batch, length, heads, dim = q.shape
    before = k.shape[1] - length
    size = min(length, max(BLOCK, before))
    count = -(-length // size)
    pad = count * size - length
    q = q * (dim**-0.5 if scale is None else scale)

    def queries(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, count, size, *x.shape[2:])

    def keys(x: jax.Array) -> jax.Array:
        own, tail = queries(x[:, before:]), x[:, None, :before]
        if count > 1:
            tail = jnp.concatenate([tail, own[:, :-1, size - before :]], axis=1)
        return jnp.concatenate([tail, own], axis=2)

    seen = visible(
        Sliding(window), before + jnp.arange(size)[None], jnp.arange(before + size)[None]
    )[0]
    here = jnp.ones((batch, length + before), bool) if there is None else there.astype(bool)
    here = keys(here)
    seen = seen & here[:, :, None]
    if q_segments is not None:
        mine, theirs = queries(q_segments)[..., None], keys(k_segments)[:, :, None]
        seen = seen & ((mine == theirs) | (theirs == -1))
    kv_heads = k.shape[2]
    blocks = queries(q).reshape(batch, count, size, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "bcikgd,bcjkd->bckgij", blocks, keys(k), preferred_element_type=jnp.float32
    )
    scores = jnp.where(seen[:, :, None, None], scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(top > MASKED / 2, jnp.exp(scores - top), 0)
    out = jnp.einsum(
        "bckgij,bcjkd->bcikgd", weights.astype(v.dtype), keys(v),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    join = lambda y: y.reshape(batch, count * size, heads, *y.shape[5:])[:, :length]
    rows = lambda y: join(jnp.moveaxis(y, 4, 2))
    return join(out), rows(weights.sum(axis=-1)), rows(top[..., 0])


def in_order(ring: dict[str, jax.Array], start: jax.Array) -> tuple[jax.Array, ...]:
    """The keys and values of a ring by position, and which are there.

    Args:
      start: ``[B, 1]``, the position of each row's next token.

    Returns:
      ``k, v [B, W, K, H]`` and ``there [B, W]`` of positions ``start - W .. start - 1``.
    """
    slots = ring["k"].shape[1]
    at = (start + jnp.arange(slots)) % slots
    take = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
    there = jnp.take_along_axis(ring_positions(start, slots), at, axis=1) >= 0
    return take(ring["k"]), take(ring["v"]), there
