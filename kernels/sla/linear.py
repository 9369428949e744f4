"""The linear branch: over all keys, or over each row's marginal blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.block_sparse_attention.layout import by_head, by_token, product
from flora_jax.kernels.sla.config import SLAConfig

EPSILON = 1e-5
"""Added to the denominator of ``main``, as its code does; the other variants add nothing."""


def over_all(q: Array, k: Array, v: Array, cfg: SLAConfig) -> Array:
    """``phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + eps)``, ``[B, T, N, H]`` float32."""
    pq, pk = cfg.phi(q), cfg.phi(k)
    pq = pq.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    state = product("bskf,bskd->bkfd", pk, v).astype(q.dtype)
    total = pk.astype(jnp.float32).sum(axis=1)
    numerator = product("btkrf,bkfd->btkrd", pq, state)
    denominator = product("btkrf,bkf->btkr", pq.astype(jnp.float32), total) + EPSILON
    return (numerator / denominator[..., None]).reshape(q.shape)


def over_marginal(q: Array, k: Array, v: Array, marginal: Array, cfg: SLAConfig) -> Array:
    """The same over the blocks that ``marginal [B, N, N_q, N_k]`` allows; 0 where there are none.

    Sums per key block, then one product with the map as a matrix of zeros and ones: no sum is found
    by subtraction. One key head at a time, recomputed in the backward pass, so that the sums
    ``[N_k, F, H]`` of only one head exist at once.
    """
    batch, key_heads, width = q.shape[0], k.shape[2], q.shape[3]
    pk = by_head(cfg.phi(k), cfg.block_k)  # zeros past the last key, whatever phi(0) is
    pq, vb = by_head(cfg.phi(q), cfg.block_q), by_head(v, cfg.block_k)
    lead = batch * key_heads
    pq = pq.reshape(lead, -1, pq.shape[2] // cfg.block_q, cfg.block_q, width)
    pk, vb = (x.reshape(lead, -1, cfg.block_k, width) for x in (pk, vb))
    map_ = marginal.reshape(lead, -1, *marginal.shape[2:])

    @jax.checkpoint
    def head(arrays: tuple[Array, ...]) -> Array:
        pq, pk, v, allowed = arrays
        allowed = allowed.astype(q.dtype)
        h = product("jsf,jsd->jfd", pk, v).astype(q.dtype)
        z = pk.astype(jnp.float32).sum(axis=1)
        state = product("rij,jfd->rifd", allowed, h).astype(q.dtype)
        total = product("rij,jf->rif", allowed.astype(jnp.float32), z)
        numerator = product("riqf,rifd->riqd", pq, state)
        denominator = product("riqf,rif->riq", pq.astype(jnp.float32), total)[..., None]
        return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)

    out = jax.lax.map(head, (pq, pk, vb, map_))
    return by_token(out.reshape(batch, q.shape[2], -1, width), q.shape[1])
