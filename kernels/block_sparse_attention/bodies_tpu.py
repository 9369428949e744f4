"""What a grid step of the TPU kernels computes.

Queries lie along lanes in every tile of scores, so that numbers per query are rows ``[1, block_q]``
and reductions over keys run along sublanes. ``place`` and the other scalars only steer the copies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from flora_jax.kernels.block_sparse_attention import tile
from flora_jax.kernels.block_sparse_attention.layout import Shape
from flora_jax.kernels.heads import Heads

ROWS = tile.Rows(axis=0, keep=True)


def queries(shape: Shape) -> Heads:
    """Where q, o and their gradients lie."""
    return Heads(
        batch=shape.batch, tokens=shape.queries, key_heads=shape.key_heads, repeats=shape.repeats,
        width=shape.width, block=shape.block_q,
    )  # fmt: skip


def keys(shape: Shape) -> Heads:
    """Where k, v and their gradients lie."""
    return Heads(
        batch=shape.batch, tokens=shape.keys, key_heads=shape.key_heads, width=shape.width,
        block=shape.block_k,
    )  # fmt: skip


def _dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _scores(shape: Shape, q: Array, k: Array, block: Any, real: Any = None) -> Array:
    """Base-2 scores ``[block_k, block_q]``; ``block``, ``real``: scalars, None where all counts."""
    s = _dot(k, q, (1, 1)) * (shape.scale * tile.LOG2E)
    if block is not None and shape.keys % shape.block_k:
        index = block * shape.block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
        s = jnp.where(index < shape.keys, s, tile.MASKED)
    return s if real is None else jnp.where(real, s, tile.MASKED)


def _listed(shape: Shape, u: int, table: Any) -> tuple[list[Any], list[Any]]:
    """Block indices of this step's entries, and which are real (None where all are)."""
    h, i, t = (pl.program_id(axis) for axis in range(3))
    steps = pl.num_programs(2)
    at = ((h * pl.num_programs(1) + i) * steps + t) * u
    whole = shape.entries % u == 0
    real = [None if whole or r == 0 else t * u + r < shape.entries for r in range(u)]
    return [table[at + r] for r in range(u)], real


def forward(shape: Shape, u: int, place: Any, table: Any, q: Any, *refs: Any) -> None:
    del place
    ks, vs, (o, lse, top, total, acc) = refs[:u], refs[u : 2 * u], refs[2 * u :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        top[...] = jnp.full_like(top, tile.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    blocks, real = _listed(shape, u, table)
    s = [_scores(shape, q[...], k[...], *which) for k, *which in zip(ks, blocks, real)]
    vs = [keys(shape).real(v[...], block) for v, block in zip(vs, blocks)]
    p, decay, top[...], total[...] = tile.softmax_step(
        jnp.concatenate(s), top[...], total[...], ROWS
    )
    p = p.astype(q.dtype)
    parts = [p[r * shape.block_k :][: shape.block_k] for r in range(u)]
    acc[...] = acc[...] * decay + sum(_dot(v, part, (0, 0)) for v, part in zip(vs, parts))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o[...] = (acc[...] / total[...]).T.astype(o.dtype)
        lse[...] = tile.log_sum(top[...], total[...])


def dq(shape: Shape, u: int, place: Any, table: Any, *refs: Any) -> None:
    del place
    q, do, o, lse2, dlse = refs[:5]
    ks, vs, (dq, terms, acc) = refs[5 : 5 + u], refs[5 + u : 5 + 2 * u], refs[5 + 2 * u :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        outer = o[...].astype(jnp.float32) * do[...].astype(jnp.float32)
        found = jnp.sum(outer.T, axis=0, keepdims=True) - dlse[...]
        terms[...] = queries(shape).real(found, pl.program_id(1), axis=1)

    for k, v, block, real in zip(ks, vs, *_listed(shape, u, table)):
        k, v = (keys(shape).real(x[...], block) for x in (k, v))
        s = _scores(shape, q[...], k, block, real)
        dp = _dot(v, do[...], (1, 1))
        ds = tile.score_gradient(tile.weights(s, lse2[...], ROWS), dp, terms[...], ROWS)
        acc[...] += _dot(k, ds.astype(q.dtype), (0, 0))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dq[...] = (acc[...] * shape.scale).T.astype(dq.dtype)


def dkv(shape: Shape, u: int, *refs: Any) -> None:
    (_, column, rows, count, k, v), refs = refs[:6], refs[6:]
    qs, dos, lse2s, terms = (refs[n * u : (n + 1) * u] for n in range(4))
    dk, dv, dk_sum, dv_sum = refs[4 * u :]
    h, g = pl.program_id(0), pl.program_id(1)
    last = pl.num_programs(1) - 1
    at = h * pl.num_programs(1) + g

    @pl.when((g == 0) | (column[at] != column[jnp.maximum(at - 1, 0)]))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    for r in range(u):

        @pl.when(r < count[at])
        def _(r=r):
            # Keys past the end only touch rows of dk and dv that are cut off.
            row = rows[at * u + r]
            q, do = (queries(shape).real(x[...], row) for x in (qs[r], dos[r]))
            s = _scores(shape, q, k[...], None)
            dp = _dot(v[...], do, (1, 1))
            p = tile.weights(s, lse2s[r][...], ROWS)
            ds = tile.score_gradient(p, dp, terms[r][...], ROWS)
            dv_sum[...] += _dot(p.astype(k.dtype), do, (1, 0))
            dk_sum[...] += _dot(ds.astype(k.dtype), q, (1, 0))

    @pl.when((g == last) | (column[at] != column[jnp.minimum(at + 1, column.shape[0] - 1)]))
    def _():
        dk[...] = (dk_sum[...] * shape.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
