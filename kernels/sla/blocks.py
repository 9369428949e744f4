"""Which blocks are critical, marginal and negligible, from means over blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels import dispatch
from flora_jax.kernels.sla.config import SLAConfig


def block_means(x: Array, block: int) -> Array:
    """``[B, T, N, H] -> [B, ceil(T / block), N, H]`` float32; a short block divides by its rows."""
    batch, tokens, *head = x.shape
    # Heads side by side, as a projection leaves them: nothing is copied into another order.
    x, behind = x.reshape(batch, tokens, -1), -tokens % block
    if dispatch.platform() == "tpu":
        # In one pass: of a plain sum, and of a window's by heads, the compiler writes all of x in
        # float32 first.
        window, pad = (1, block, 1), ((0, 0), (0, behind), (0, 0))
        x = jax.lax.reduce_window(x.astype(jnp.float32), 0.0, jax.lax.add, window, window, pad)
        x = jax.lax.optimization_barrier(x)
    else:
        x = jnp.pad(x, ((0, 0), (0, behind), (0, 0))).reshape(batch, -1, block, x.shape[2])
        x = x.sum(axis=2, dtype=jnp.float32)
    rows = jnp.minimum(block, tokens - block * jnp.arange(x.shape[1]))
    return (x / rows[:, None]).reshape(batch, -1, *head)


def scores(q: Array, k: Array, cfg: SLAConfig) -> Array:
    """Product of block means, float32 ``[B, N, N_q, N_k]``.

    The means of keys lose their mean over tokens first: that moves all scores of a row alike, and
    keeps a common part of the keys from drowning their differences.
    """
    qm, km = block_means(q, cfg.block_q), block_means(k, cfg.block_k)
    full, last = jnp.split(km, [k.shape[1] // cfg.block_k], axis=1)
    total = cfg.block_k * full.sum(axis=1) + k.shape[1] % cfg.block_k * last.sum(axis=1)
    km = km - total[:, None] / k.shape[1]
    qm = qm.reshape(*qm.shape[:2], km.shape[2], -1, qm.shape[3])
    s = jnp.einsum("bikrh,bjkh->bkrij", qm, km, precision=jax.lax.Precision.HIGHEST)
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
