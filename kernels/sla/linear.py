"""The linear branch in plain XLA: over all keys, or over each row's marginal blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch
from flora_jax.kernels.block_sparse_attention import Steps, block_sparse_attention
from flora_jax.kernels.block_sparse_attention.layout import by_head, by_token, product
from flora_jax.kernels.sla.config import SLAConfig

EPSILON = 1e-5
"""Added to the denominator of ``main``, as its code does; the other variants add nothing."""

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static: the variant, the scale of the softmax's scores, what a step of the kernels
    takes (None: by their cost models), who implements it."""

    cfg: SLAConfig
    scale: float | None = None
    steps: Steps | None = None
    tokens: int | None = None
    implementation: dispatch.Choice = None

    def __post_init__(self):
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"sla: steps of {self.tokens} tokens")


def sparse_branch(call: Call, q: Array, k: Array, v: Array, table: Array) -> Array:
    """Softmax over the listed blocks."""
    cfg = call.cfg
    return block_sparse_attention(
        q, k, v, table, block_q=cfg.block_q, block_k=cfg.block_k, scale=call.scale,
        steps=call.steps, implementation=call.implementation,
    )[0]  # fmt: skip


def project(x: Array, params: Params | None) -> Array:
    """The projection without its bias, of tokens or of a state ``[..., F, H]``; None: unchanged."""
    if params is None:
        return x
    kernel = params["kernel"].astype(jnp.float32)
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def main(
    call: Call, q: Array, k: Array, v: Array, table: Array | None, params: Params | None
) -> Array:
    """The variant ``main``, both branches: ``o_s + o_l kernel + bias``, as q.

    With ``table`` and ``params`` None only the linear branch, in float32:
    ``o_l = phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + eps)``.
    """
    phi = call.cfg.phi
    pq, pk = phi(q), phi(k)
    pq = pq.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    total = pk.astype(jnp.float32).sum(axis=1)
    state = project(product("bskf,bskd->bkfd", pk, v), params).astype(q.dtype)
    numerator = product("btkrf,bkfd->btkrd", pq, state)
    denominator = product("btkrf,bkf->btkr", pq.astype(jnp.float32), total) + EPSILON
    low = (numerator / denominator[..., None]).reshape(q.shape)
    if params is None:
        return low
    sparse = sparse_branch(call, q, k, v, table).astype(jnp.float32)
    return (sparse + (low + params["bias"].astype(jnp.float32))).astype(q.dtype)


def marginal(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    table: Array | None,
    params: Params | None,
    marginal: Array,
) -> Array:
    """The other variants, both branches, or as in ``main`` only the linear one; see there."""
    low = over_marginal(q, k, v, marginal, call.cfg)
    if params is None:
        return low
    return (
        sparse_branch(call, q, k, v, table).astype(jnp.float32)
        + (project(low, params) + params["bias"].astype(jnp.float32))
    ).astype(q.dtype)


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
