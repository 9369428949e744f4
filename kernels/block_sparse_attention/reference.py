"""The specification: softmax over all keys, weighted by how often the table lists their block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.block_sparse_attention.layout import Shape


def listed(shape: Shape, table: Array) -> Array:
    """How often each key block is listed for each query block, int32 ``[B, N, N_q, N_k]``."""
    return jnp.sum(jax.nn.one_hot(table, shape.key_blocks, dtype=jnp.int32), axis=-2)


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``; builds ``[T, S]``."""
    exact = jax.lax.Precision.HIGHEST
    k, v = (jnp.repeat(x, shape.repeats, axis=2).astype(jnp.float32) for x in (k, v))
    s = shape.scale * jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision=exact)
    times = listed(shape, table)
    times = jnp.repeat(jnp.repeat(times, shape.block_q, axis=2), shape.block_k, axis=3)
    times = times[:, :, : shape.queries, : shape.keys]
    s = jnp.where(times > 0, s + jnp.log(jnp.maximum(times, 1)), -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    o = jnp.einsum("bnts,bsnh->btnh", jnp.exp(s - lse[..., None]), v, precision=exact)
    return o.astype(q.dtype), jnp.swapaxes(lse, 1, 2)


def backward(
    shape: Shape,
    q: Array,
    k: Array,
    v: Array,
    table: Array,
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
) -> tuple[Array, Array, Array]:
    """``(dq, dk, dv)`` by automatic differentiation."""
    del o, lse
    return jax.vjp(lambda q, k, v: forward(shape, q, k, v, table), q, k, v)[1]((do, dlse))
