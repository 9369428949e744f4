"""The op in plain XLA: the listed blocks gathered for a few query blocks at a time.

Memory beyond arguments and results: a gathered tile of about ``TILE`` elements, and in the backward
pass dk and dv in float32. Nothing grows with ``T * S``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels.block_sparse_attention.layout import (
    Shape,
    by_head,
    by_token,
    product,
    row_terms,
    rows_by_head,
)

TILE = 1 << 22
"""Elements of gathered keys at a time (at least one query block of all heads). Of the
candidates the largest makes the fewest steps, and all else that changes is the memory."""


def _group(shape: Shape) -> int:
    """Query blocks per step: a divisor of their number, so that no step is half empty."""
    each = shape.batch * shape.heads * shape.entries * shape.block_k * shape.width
    limit = shape.steps.queries or max(1, TILE // each)
    sizes = range(1, min(limit, shape.query_blocks) + 1)
    return max(size for size in sizes if shape.query_blocks % size == 0)


def _queries(shape: Shape, x: Array) -> Array:
    """``[B, T, N(, H)] -> [steps, B, K, R, g, block_q(, H)]``."""
    rows = x.ndim == 3
    x = rows_by_head(x, shape.block_q) if rows else by_head(x, shape.block_q)
    lead = (shape.batch, shape.key_heads, shape.repeats, -1, _group(shape), shape.block_q)
    return jnp.moveaxis(x.reshape(lead if rows else (*lead, shape.width)), 3, 0)


def _tokens(shape: Shape, x: Array) -> Array:
    """The inverse of ``_queries``."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(shape.batch, shape.heads, -1, *x.shape[6:])
    return jnp.swapaxes(x[:, :, : shape.queries], 1, 2)


def _keys(shape: Shape, x: Array) -> Array:
    """``[B, S, K, H] -> [B, K, N_k, block_k, H]``."""
    return by_head(x, shape.block_k).reshape(
        shape.batch, shape.key_heads, shape.key_blocks, shape.block_k, shape.width
    )


def _entries(shape: Shape, table: Array) -> Array:
    """``[B, N, N_q, n] -> [steps, B, K, R, g, n]``."""
    lead = (shape.batch, shape.key_heads, shape.repeats, -1, _group(shape), shape.entries)
    return jnp.moveaxis(table.reshape(lead), 3, 0)


def _gather(blocks: Array, entries: Array) -> Array:
    """Blocks ``[B, K, N_k, block_k, H]`` at ``[B, K, R, g, n] -> [B, K, R, g, n, block_k, H]``."""
    return jax.vmap(jax.vmap(lambda block, index: block[index]))(blocks, entries)


def _scores(shape: Shape, q: Array, k: Array, entries: Array) -> Array:
    """``[..., g, block_q, n, block_k]`` float32, minus infinity past the last key."""
    s = shape.scale * product("bkrgqh,bkrgnsh->bkrgqns", q, k)
    if shape.keys % shape.block_k == 0:
        return s
    index = entries[..., None, :, None] * shape.block_k + jnp.arange(shape.block_k)
    return jnp.where(index < shape.keys, s, -jnp.inf)


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    kb, vb = _keys(shape, k), _keys(shape, v)

    def step(arrays: tuple[Array, Array]) -> tuple[Array, Array]:
        qg, entries = arrays
        s = _scores(shape, qg, _gather(kb, entries), entries)
        top = s.max(axis=(-2, -1))
        p = jnp.exp(s - top[..., None, None])
        total = p.sum(axis=(-2, -1))
        o = product("bkrgqns,bkrgnsh->bkrgqh", p.astype(v.dtype), _gather(vb, entries))
        return (o / total[..., None]).astype(q.dtype), top + jnp.log(total)

    o, lse = jax.lax.map(step, (_queries(shape, q), _entries(shape, table)))
    return _tokens(shape, o), _tokens(shape, lse)


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
    """``(dq, dk, dv)``: probabilities again from ``lse``, dk and dv added up in float32."""
    kb, vb = _keys(shape, k), _keys(shape, v)

    def step(sums: tuple[Array, Array], arrays: tuple[Array, ...]) -> tuple[tuple, Array]:
        qg, dog, lseg, terms, entries = arrays
        kg, vg = _gather(kb, entries), _gather(vb, entries)
        p = jnp.exp(_scores(shape, qg, kg, entries) - lseg[..., None, None])
        dp = product("bkrgqh,bkrgnsh->bkrgqns", dog, vg)
        ds = (shape.scale * p * (dp - terms[..., None, None])).astype(q.dtype)
        dk = product("bkrgqns,bkrgqh->bkrgnsh", ds, qg)
        dv = product("bkrgqns,bkrgqh->bkrgnsh", p.astype(q.dtype), dog)
        sums = tuple(_scatter(total, entries, x) for total, x in zip(sums, (dk, dv)))
        return sums, product("bkrgqns,bkrgnsh->bkrgqh", ds, kg).astype(q.dtype)

    zeros = jnp.zeros_like(kb, jnp.float32)
    arrays = (q, do, lse, row_terms(o, do, dlse))
    arrays = (*(_queries(shape, x) for x in arrays), _entries(shape, table))
    (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), arrays)
    lead = (shape.batch, shape.key_heads, -1, shape.width)
    dk, dv = (by_token(x.reshape(lead), shape.keys).astype(q.dtype) for x in (dk, dv))
    return _tokens(shape, dq), dk, dv


def _scatter(total: Array, entries: Array, x: Array) -> Array:
    return jax.vmap(jax.vmap(lambda total, index, x: total.at[index].add(x)))(total, entries, x)
