"""The op on TPU: the table is prefetched as scalars and steers which key blocks are copied in.

Queries lie along lanes in every tile of scores, so that numbers per query are rows ``[1, block_q]``
and reductions over keys run along sublanes. A grid step takes several listed blocks, each by an
input of its own, since a step has a fixed cost. The gradient of keys and values walks the table
read by key block (``layout.segments``), in a grid of static size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import dispatch
from flora_jax.kernels.block_sparse_attention import tile
from flora_jax.kernels.block_sparse_attention.layout import (
    Shape,
    fold_keys,
    fold_queries,
    fold_table,
    row_terms,
    segments,
    unfold_keys,
    unfold_queries,
)

ROWS = tile.Rows(axis=0, keep=True)
STEP = 512
"""Keys (or, for keys' gradients, queries) that a grid step works on, about."""
SMEM = 256 << 10
"""Bytes of prefetched scalars per call; more heads than that are several calls."""
VMEM = 14 << 20
"""Bytes of blocks and tiles per grid step, by ``_memory``; the compiler's own limit is 16 MiB."""


def _group(count: int, block: int) -> int:
    """Blocks per grid step."""
    return max(1, min(count, STEP // block))


def _memory(shape: Shape, itemsize: int) -> int:
    """Bytes of VMEM that the largest of the kernels needs, inputs held twice."""
    lanes = -(-shape.width // 128) * 128
    u = max(_group(shape.entries, shape.block_k) * shape.block_k, shape.block_k)
    w = max(_group(shape.query_blocks, shape.block_q) * shape.block_q, shape.block_q)
    inputs = 2 * 2 * itemsize * lanes * (max(u, w) + max(shape.block_q, shape.block_k))
    sums = 2 * 4 * lanes * max(shape.block_q, shape.block_k)
    return inputs + sums + 4 * 4 * max(u * shape.block_q, w * shape.block_k)


def supported(shape: Shape, dtype: Any) -> None:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"float32 or bfloat16, not {dtype}")
    rows = 32 // jnp.dtype(dtype).itemsize
    if shape.block_q % 128 or shape.block_k % rows:
        raise NotImplementedError(
            f"blocks {shape.block_q} x {shape.block_k}: multiples of 128 x {rows} in {dtype}"
        )
    need = _memory(shape, jnp.dtype(dtype).itemsize)
    if need > VMEM:
        raise NotImplementedError(
            f"blocks {shape.block_q} x {shape.block_k} need {need >> 20} MiB of {VMEM >> 20}"
        )


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


def _forward_kernel(shape: Shape, u: int, first: Any, table: Any, q: Any, *refs: Any) -> None:
    del first
    ks, vs, (o, lse, top, total, acc) = refs[:u], refs[u : 2 * u], refs[2 * u :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        top[...] = jnp.full_like(top, tile.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    blocks, real = _listed(shape, u, table)
    s = [_scores(shape, q[...], k[...], *which) for k, *which in zip(ks, blocks, real)]
    p, decay, top[...], total[...] = tile.softmax_step(
        jnp.concatenate(s), top[...], total[...], ROWS
    )
    p = p.astype(q.dtype)
    parts = [p[r * shape.block_k :][: shape.block_k] for r in range(u)]
    acc[...] = acc[...] * decay + sum(_dot(v[...], part, (0, 0)) for v, part in zip(vs, parts))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o[...] = (acc[...] / total[...]).T.astype(o.dtype)
        lse[...] = tile.log_sum(top[...], total[...])


def _dq_kernel(shape: Shape, u: int, first: Any, table: Any, *refs: Any) -> None:
    del first
    q, do, lse2, terms = refs[:4]
    ks, vs, (dq, acc) = refs[4 : 4 + u], refs[4 + u : 4 + 2 * u], refs[4 + 2 * u :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    for k, v, *which in zip(ks, vs, *_listed(shape, u, table)):
        s = _scores(shape, q[...], k[...], *which)
        dp = _dot(v[...], do[...], (1, 1))
        _, ds = tile.score_gradient(s, dp, lse2[...], terms[...], ROWS)
        acc[...] += _dot(k[...], ds.astype(q.dtype), (0, 0))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dq[...] = (acc[...] * shape.scale).T.astype(dq.dtype)


def _dkv_kernel(shape: Shape, u: int, *refs: Any) -> None:
    (_, column, _, count, k, v), refs = refs[:6], refs[6:]
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
            s = _scores(shape, qs[r][...], k[...], None)
            dp = _dot(v[...], dos[r][...], (1, 1))
            p, ds = tile.score_gradient(s, dp, lse2s[r][...], terms[r][...], ROWS)
            dv_sum[...] += _dot(p.astype(k.dtype), dos[r][...], (1, 0))
            dk_sum[...] += _dot(ds.astype(k.dtype), qs[r][...], (1, 0))

    @pl.when((g == last) | (column[at] != column[jnp.minimum(at + 1, column.shape[0] - 1)]))
    def _():
        dk[...] = (dk_sum[...] * shape.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _over_heads(
    call: Callable[..., Any], heads: int, scalars: Sequence[Array], arrays: Sequence[Array]
) -> Any:
    """``call(first, *scalars, *arrays)`` for so many heads at a time that the scalars fit SMEM.

    Args:
      call: makes results ``[chunk, ...]`` for heads from ``first`` on, of whole ``arrays``.
      scalars: ``[heads, ...]``.
    """
    each = sum(4 * math.prod(x.shape[1:]) for x in scalars)
    fits = [n for n in range(1, heads + 1) if heads % n == 0 and n * each <= SMEM]
    if not fits:
        raise NotImplementedError(f"a table of {each >> 10} KiB per head; {SMEM >> 10} fit")
    chunk = max(fits)
    parts = [x.reshape(heads // chunk, -1) for x in scalars]
    starts = jnp.arange(0, heads, chunk, dtype=jnp.int32)[:, None]
    if chunk == heads:
        return call(chunk, starts[0], *(x[0] for x in parts), *arrays)
    out = jax.lax.map(lambda x: call(chunk, *x, *arrays), (starts, *parts))
    return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), out)


def _padded(table: Array, u: int) -> Array:
    """Rows as long as a multiple of ``u``: the last entry again, which is not copied twice."""
    return jnp.pad(table, ((0, 0), (0, 0), (0, -table.shape[2] % u)), mode="edge")


def _by_query(shape: Shape, u: int, chunk: int, blocks: int, steps: int) -> tuple[Any, ...]:
    """Grid and blocks (grid, per query, per row, per key, out, out row) of the first kernels."""

    def key(r: int) -> pl.BlockSpec:
        def index(h: Any, i: Any, t: Any, first: Any, table: Any) -> tuple[Any, ...]:
            return first[0] + h, table[((h * blocks + i) * steps + t) * u + r], 0

        return pl.BlockSpec((None, shape.block_k, shape.width), index)

    wide, flat = (None, shape.block_q, shape.width), (None, 1, shape.block_q)
    query = pl.BlockSpec(wide, lambda h, i, t, first, table: (first[0] + h, i, 0))
    row = pl.BlockSpec(flat, lambda h, i, t, first, table: (first[0] + h, 0, i))
    out = pl.BlockSpec(wide, lambda h, i, t, *_: (h, i, 0))
    out_row = pl.BlockSpec(flat, lambda h, i, t, *_: (h, 0, i))
    return (chunk, blocks, steps), query, row, [key(r) for r in range(u)], out, out_row


def _pallas(
    kernel: Any,
    grid: tuple[int, ...],
    specs: tuple[list[Any], Any],
    types: Any,
    scratch: Sequence[tuple[int, ...]],
    *,
    scalars: int,
    flops: int,
) -> Any:
    """``pallas_call`` of a grid whose last axis is walked in order, with float32 scratch."""
    results = jax.tree.leaves(types)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=grid,
            in_specs=specs[0],
            out_specs=specs[1],
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
        ),
        out_shape=types,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * (len(grid) - 1)
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in results),
        ),
        interpret=dispatch.interpret_mode(),
    )


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    supported(shape, q.dtype)
    u = _group(shape.entries, shape.block_k)
    qf, kf, vf = fold_queries(shape, q), fold_keys(shape, k), fold_keys(shape, v)
    table = _padded(fold_table(shape, table), u)
    heads, blocks, steps = table.shape[0], table.shape[1], table.shape[2] // u

    def call(chunk: int, first: Array, table: Array, q: Array, k: Array, v: Array) -> Any:
        grid, query, _, key, out, out_row = _by_query(shape, u, chunk, blocks, steps)
        rows = (chunk, 1, q.shape[1])
        types = (
            jax.ShapeDtypeStruct((chunk, *q.shape[1:]), q.dtype),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        )
        flat = (1, shape.block_q)
        kernel = functools.partial(_forward_kernel, shape, u)
        scratch = [flat, flat, (shape.width, shape.block_q)]
        specs = [query, *key, *key], (out, out_row)
        flops = 4 * shape.width * table.size * shape.block_q * shape.block_k
        run = _pallas(kernel, grid, specs, types, scratch, scalars=2, flops=flops)
        return run(first, table, q, *[k] * u, *[v] * u)

    o, lse = _over_heads(call, heads, [table], [qf, kf, vf])
    return unfold_queries(shape, o), unfold_queries(shape, lse[:, 0])


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
    """``(dq, dk, dv)``, the probabilities again from ``lse``."""
    supported(shape, q.dtype)
    kf, vf = fold_keys(shape, k), fold_keys(shape, v)
    queries = [fold_queries(shape, x) for x in (q, do.astype(q.dtype))]
    rows = [lse * tile.LOG2E, row_terms(o, do, dlse)]
    queries += [fold_queries(shape, x)[:, None] for x in rows]
    table = fold_table(shape, table)
    dq = _dq(shape, table, queries, kf, vf)
    dk, dv = _dkv(shape, table, queries, kf, vf)
    return unfold_queries(shape, dq), unfold_keys(shape, dk), unfold_keys(shape, dv)


def _dq(shape: Shape, table: Array, queries: Sequence[Array], k: Array, v: Array) -> Array:
    u = _group(shape.entries, shape.block_k)
    table = _padded(table, u)
    heads, blocks, steps = table.shape[0], table.shape[1], table.shape[2] // u

    def call(chunk: int, first: Array, table: Array, *arrays: Array) -> Any:
        *queries, k, v = arrays
        grid, query, row, key, out, _ = _by_query(shape, u, chunk, blocks, steps)
        types = jax.ShapeDtypeStruct((chunk, *queries[0].shape[1:]), k.dtype)
        kernel = functools.partial(_dq_kernel, shape, u)
        specs = [query, query, row, row, *key, *key], out
        flops = 6 * shape.width * table.size * shape.block_q * shape.block_k
        scratch = [(shape.width, shape.block_q)]
        run = _pallas(kernel, grid, specs, types, scratch, scalars=2, flops=flops)
        return run(first, table, *queries, *[k] * u, *[v] * u)

    return _over_heads(call, heads, [table], [*queries, k, v])


def _dkv(
    shape: Shape, table: Array, queries: Sequence[Array], k: Array, v: Array
) -> tuple[Array, Array]:
    heads, blocks = table.shape[:2]
    u = _group(blocks, shape.block_q)
    cut = functools.partial(segments, key_blocks=shape.key_blocks, length=u)
    column, pairs, count = jax.vmap(cut)(table.reshape(heads, -1))
    size = column.shape[1]

    def query(r: int, flat: bool) -> pl.BlockSpec:
        def index(h: Any, g: Any, first: Any, column: Any, rows: Any, _: Any) -> tuple[Any, ...]:
            row = rows[(h * size + g) * u + r]
            return (first[0] + h, 0, row) if flat else (first[0] + h, row, 0)

        block = (None, 1, shape.block_q) if flat else (None, shape.block_q, shape.width)
        return pl.BlockSpec(block, index)

    def call(chunk: int, first: Array, column: Array, rows: Array, count: Array, *arrays: Array):
        k, v, *queries = arrays
        block = (None, shape.block_k, shape.width)
        at = lambda h, g, column: column[h * size + g]
        key = pl.BlockSpec(block, lambda h, g, first, col, *_: (first[0] + h, at(h, g, col), 0))
        out = pl.BlockSpec(block, lambda h, g, first, col, *_: (h, at(h, g, col), 0))
        types = (jax.ShapeDtypeStruct((chunk, *k.shape[1:]), k.dtype),) * 2
        per_query = [query(r, flat) for flat in (False, False, True, True) for r in range(u)]
        kernel = functools.partial(_dkv_kernel, shape, u)
        specs = [key, key, *per_query], (out, out)
        pairs = chunk * blocks * shape.entries
        flops = 8 * shape.width * pairs * shape.block_q * shape.block_k
        scratch = [(shape.block_k, shape.width)] * 2
        run = _pallas(kernel, (chunk, size), specs, types, scratch, scalars=4, flops=flops)
        return run(first, column, rows, count, k, v, *(x for x in queries for _ in range(u)))

    # A pair (r, i, t) of the table belongs to query block r * N_q + i.
    scalars = [column, pairs // shape.entries, count]
    return _over_heads(call, heads, scalars, [k, v, *queries])
