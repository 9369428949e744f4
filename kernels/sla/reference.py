"""The specification of sparse-linear attention: every branch as a dense ``[T, S]`` matrix."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.sla.config import SLAConfig


def classes(q: Array, k: Array, cfg: SLAConfig) -> Array:
    """1 critical, 0 marginal, -1 negligible, per pair of tokens ``[B, N, T, S]``; ranks by sorting.

    Heads of k as many as of q.
    """

    def means(x: Array, block: int) -> Array:
        starts = range(0, x.shape[1], block)
        return jnp.stack([x[:, i : i + block].mean(axis=1) for i in starts], axis=1)

    qm = means(q, cfg.block_q)
    km = means(k - k.mean(axis=1, keepdims=True), cfg.block_k)
    s = jnp.einsum("binh,bjnh->bnij", qm, km, precision=jax.lax.Precision.HIGHEST)
    rank = jnp.argsort(jnp.argsort(-s, axis=-1, stable=True), axis=-1)
    critical, negligible = cfg.counts(s.shape[-1])
    kind = jnp.where(rank < critical, 1, jnp.where(rank >= s.shape[-1] - negligible, -1, 0))
    kind = jnp.repeat(jnp.repeat(kind, cfg.block_q, axis=2), cfg.block_k, axis=3)
    return kind[:, :, : q.shape[1], : k.shape[1]]


def sla(q: Array, k: Array, v: Array, params: Mapping[str, Array], cfg: SLAConfig) -> Array:
    """``sla`` of ``api.py`` in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    exact = {"precision": jax.lax.Precision.HIGHEST}
    kind = classes(*jax.lax.stop_gradient((q, k)), cfg)
    s = jnp.einsum("btnh,bsnh->bnts", q, k, **exact) * q.shape[3] ** -0.5
    p = jax.nn.softmax(jnp.where(kind == 1, s, -jnp.inf), axis=-1)
    a = jnp.einsum("btnf,bsnf->bnts", cfg.phi(q), cfg.phi(k), **exact)
    if cfg.variant == "main":
        a = a / (a.sum(axis=-1, keepdims=True) + 1e-5)
    else:
        a = jnp.where(kind == 0, a, 0)
        total = a.sum(axis=-1, keepdims=True)
        a = jnp.where(total > 0, a / jnp.where(total > 0, total, 1), 0)
    sparse, low = (jnp.einsum("bnts,bsnh->btnh", w, v, **exact) for w in (p, a))
    return sparse + jnp.matmul(low, params["kernel"], **exact) + params["bias"]
