"""Which blocks are critical, marginal and negligible, from means over blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.block_sparse_attention.layout import by_head
from flora_jax.kernels.sla.config import SLAConfig


def block_means(x: Array, block: int) -> Array:
    """``[B, T, N, H] -> [B, N, ceil(T / block), H]`` float32; a short block divides by its rows."""
    tokens = x.shape[1]
    x = by_head(x.astype(jnp.float32), block)
    x = x.reshape(*x.shape[:2], -1, block, x.shape[3]).sum(axis=3)
    rows = jnp.minimum(block, tokens - block * jnp.arange(x.shape[2]))
    return x / rows[:, None]


def scores(q: Array, k: Array, cfg: SLAConfig) -> Array:
    """Product of block means, float32 ``[B, N, N_q, N_k]``.

    Keys lose their mean over tokens first: that moves all scores of a row alike, and keeps a common
    part of the keys from drowning their differences.
    """
    k = k.astype(jnp.float32)
    qm = block_means(q, cfg.block_q)
    km = block_means(k - k.mean(axis=1, keepdims=True), cfg.block_k)
    qm = qm.reshape(qm.shape[0], km.shape[1], -1, *qm.shape[2:])
    s = jnp.einsum("bkrih,bkjh->bkrij", qm, km, precision=jax.lax.Precision.HIGHEST)
    return s.reshape(s.shape[0], -1, *s.shape[3:])


def classify(q: Array, k: Array, cfg: SLAConfig) -> tuple[Array, Array | None]:
    """The table of critical blocks and the map of marginal ones; neither has a gradient.

    Returns:
      int32 ``[B, N, N_q, n]``, ascending; booleans ``[B, N, N_q, N_k]``, or None for ``main``,
      whose linear branch needs no map.
    """
    s = scores(*jax.lax.stop_gradient((q, k)), cfg)
    critical, negligible = cfg.counts(s.shape[-1])
    table = jnp.sort(jax.lax.top_k(s, critical)[1].astype(jnp.int32), axis=-1)
    if cfg.variant == "main":
        return table, None
    out = _listed(table, s.shape[-1])
    if negligible:
        # Past the critical blocks, so that equal scores never make a block both.
        rest = jnp.where(out, jnp.inf, s)
        out |= _listed(jax.lax.top_k(-rest, negligible)[1], s.shape[-1])
    return table, ~out


def _listed(table: Array, blocks: int) -> Array:
    flat = table.reshape(-1, table.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    found = jnp.zeros((flat.shape[0], blocks), bool).at[rows, flat].set(True)
    return found.reshape(*table.shape[:-1], blocks)
