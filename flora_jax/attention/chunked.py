"""Exact softmax attention in blocks of queries and keys: O(T) memory, forwards and backwards.

The online softmax of FlashAttention (arXiv 2205.14135) in plain jax. What is kept for the backward
pass is the output and ``lse_i = log sum_j e^s_ij``; the weights are computed again block by block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.attention.masks import Mask, Sliding, visible
from flora_jax.attention.window import MASKED

Where = dict[str, jax.Array]


class Blocks(NamedTuple):
    """What is static of one call: a mask (its window is in ``where``), sizes of blocks.

    ``ordered``: query and key i stand at place i, so that whole blocks need not be visited.
    """

    mask: Mask
    scale: float
    q_size: int
    k_size: int
    ordered: bool


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    where: dict[str, jax.Array | None],
    *,
    scale: float,
    chunk: int = 128,
    ordered: bool = False,
) -> jax.Array:
    """``softmax(scale q k^T + mask) v`` with blocks of ``chunk`` queries and keys.

    Args:
      q: ``[B, T, N, H]``.
      k, v: ``[B, S, K, H]``.
      where: ``q_positions [B or 1, T]``, ``k_positions [B or 1, S]``; ``q_segments``,
        ``k_segments``, ``valid [B or 1, S]`` and ``always [B or 1, S]`` (keys that every query
        sees), or None.
      ordered: positions count from 0 on both sides, and there is no ``always``.

    Returns:
      ``[B, T, N, H]`` in q's dtype; zeros for a query without keys.
    """
    length, keys = q.shape[1], k.shape[1]
    if isinstance(mask, Sliding):
        where = where | {"window": jnp.asarray(mask.window)}
        ordered = ordered and isinstance(mask.window, int)
        mask = Sliding(mask.window if ordered else 0)
    q_size, k_size = min(chunk, length), min(chunk, keys)
    where = {name: array for name, array in where.items() if array is not None}
    where.setdefault("valid", jnp.ones((1, keys), bool))
    fit = lambda x, size: jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    for name, array in where.items():
        if name != "window":
            where[name] = fit(array, q_size if name.startswith("q_") else k_size)
    blocks = Blocks(mask, scale, q_size, k_size, ordered)
    out = _attend(blocks, fit(q, q_size), fit(k, k_size), fit(v, k_size), where)
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, where: Where) -> jax.Array:
    return _forward(blocks, q, k, v, where)[0]


def _rows(x: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """``[B, T, N, H] -> [blocks, B, K, G, size, H]``."""
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length // size, size, kv_heads, heads // kv_heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _unrows(x: jax.Array) -> jax.Array:
    count, batch, kv_heads, group, size, dim = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * size, kv_heads * group, dim)


def _columns(x: jax.Array, size: int) -> jax.Array:
    """``[B, S, K, H] -> [blocks, B, K, size, H]``."""
    batch, keys, heads, dim = x.shape
    return x.reshape(batch, keys // size, size, heads, dim).transpose(1, 0, 3, 2, 4)


def _scores(blocks: Blocks, where: Where, q: jax.Array, k: jax.Array, i: Any, j: Any) -> jax.Array:
    """``[B, K, G, size, size]`` of query block i and key block j, MASKED where nothing is seen."""

    def part(name: str) -> jax.Array | None:
        if name not in where:
            return None
        at, size = (i, blocks.q_size) if name.startswith("q_") else (j, blocks.k_size)
        return jax.lax.dynamic_slice_in_dim(where[name], at * size, size, axis=1)

    mask = blocks.mask
    if isinstance(mask, Sliding):
        mask = dataclasses.replace(mask, window=where["window"])
    seen = visible(
        mask,
        part("q_positions"),
        part("k_positions"),
        q_segments=part("q_segments"),
        k_segments=part("k_segments"),
        valid=part("valid"),
    )
    always = part("always")
    seen = seen if always is None else seen | always.astype(bool)[:, None]
    scores = jnp.einsum("bkgid,bkjd->bkgij", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None, None], scores * blocks.scale, MASKED)


def _span(blocks: Blocks, i: Any, count: int) -> tuple[Any, Any]:
    """The first and one past the last key block that query block i may see."""
    low, high = 0, count
    if blocks.ordered and blocks.mask.causal:
        high = jnp.minimum(((i + 1) * blocks.q_size + blocks.k_size - 1) // blocks.k_size, count)
    if blocks.ordered and isinstance(blocks.mask, Sliding):
        low = jnp.maximum((i * blocks.q_size - blocks.mask.window + 1) // blocks.k_size, 0)
    return low, high


def _forward(blocks, q, k, v, where):
    kv_heads = k.shape[2]
    q_rows = _rows(q, blocks.q_size, kv_heads)
    k_blocks, v_blocks = _columns(k, blocks.k_size), _columns(v, blocks.k_size)

    def one(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, q = x

        def step(j, carry):
            top, total, out = carry
            scores = _scores(blocks, where, q, k_blocks[j], i, j)
            new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights = jnp.where(scores > MASKED / 2, jnp.exp(scores - new), 0)
            keep = jnp.exp(top - new)
            more = jnp.einsum(
                "bkgij,bkjd->bkgid", weights.astype(v.dtype), v_blocks[j],
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return new, keep * total + weights.sum(axis=-1, keepdims=True), keep * out + more

        edge = jnp.full((*q.shape[:-1], 1), MASKED, jnp.float32)
        start = (edge, jnp.zeros_like(edge), jnp.zeros(q.shape, jnp.float32))
        top, total, out = jax.lax.fori_loop(*_span(blocks, i, len(k_blocks)), step, start)
        some = total > 0
        lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), jnp.inf)
        return (out / jnp.where(some, total, 1)).astype(q.dtype), lse

    out, lse = jax.lax.map(one, (jnp.arange(len(q_rows)), q_rows))
    return _unrows(out), (q, k, v, where, out, lse)


def _backward(blocks, saved, cotangent):
    q, k, v, where, out, lse = saved
    kv_heads = k.shape[2]
    k_blocks, v_blocks = _columns(k, blocks.k_size), _columns(v, blocks.k_size)
    d_rows = _rows(cotangent, blocks.q_size, kv_heads)

    def one(carry, x):
        i, q, out, lse, d_out = x
        d_out = d_out.astype(jnp.float32)
        delta = (d_out * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)

        def step(j, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_scores(blocks, where, q, k_blocks[j], i, j) - lse)
            d_weights = jnp.einsum("bkgid,bkjd->bkgij", d_out, v_blocks[j].astype(jnp.float32))
            d_scores = weights * (d_weights - delta) * blocks.scale
            d_q = d_q + jnp.einsum("bkgij,bkjd->bkgid", d_scores, k_blocks[j].astype(jnp.float32))
            d_k = d_k.at[j].add(jnp.einsum("bkgij,bkgid->bkjd", d_scores, q.astype(jnp.float32)))
            d_v = d_v.at[j].add(jnp.einsum("bkgij,bkgid->bkjd", weights, d_out))
            return d_q, d_k, d_v

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(*_span(blocks, i, len(k_blocks)), step, start)
        return tuple(carry), d_q.astype(q.dtype)

    none = jnp.zeros(k_blocks.shape, jnp.float32)
    q_rows = _rows(q, blocks.q_size, kv_heads)
    xs = (jnp.arange(len(q_rows)), q_rows, out, lse, d_rows)
    (d_k, d_v), d_q = jax.lax.scan(one, (none, none), xs)
    whole = lambda x, like: x.transpose(1, 0, 3, 2, 4).reshape(like.shape).astype(like.dtype)
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), where)
    return _unrows(d_q), whole(d_k, k), whole(d_v, v), nothing


_attend.defvjp(_forward, _backward)
