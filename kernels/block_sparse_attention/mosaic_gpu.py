"""The op on Hopper GPUs: one warpgroup copies the listed blocks in, others multiply.

A program owns ``block_q`` queries of a head (for keys' gradients: one segment of a key block) and
walks its row of the table: the copying warpgroup reads the block's index and starts the copies of
keys and values into a ring of buffers, the others wait for a buffer, use it and hand it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import hopper
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

ROWS = tile.Rows(axis=1, keep=False)
COLUMNS = tile.Rows(axis=0, keep=False)
SEGMENT = 32
"""Query blocks per program in the gradient of keys and values."""


def supported(shape: Shape, dtype: Any) -> None:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"bfloat16 or float16, not {dtype}")
    if shape.width not in (64, 128):
        raise NotImplementedError(f"heads of width 64 or 128, not {shape.width}")
    if shape.block_q not in (64, 128) or shape.block_k not in (64, 128):
        blocks = f"{shape.block_q} x {shape.block_k}"
        raise NotImplementedError(f"blocks {blocks}: 64 or 128 each")


def _listed(row: Any, k_ref: Any, v_ref: Any, block_k: int) -> Callable[[Any], Sequence[Any]]:
    """The keys and values of the block that a table's row lists at step t."""

    def sources(t: Any) -> Sequence[Any]:
        at = pl.ds(row[t] * block_k, block_k)
        return k_ref.at[at], v_ref.at[at]

    return sources


def _readers(block: int) -> tuple[int, int]:
    """How many warpgroups share a block's rows, and how many rows each has."""
    return block // 64, 64


def _row(value: float, rows: int) -> Array:
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout)


def _load(ref: Any, axis: int) -> Array:
    """Numbers per query from shared memory, for a tile that loses ``axis``."""
    return hopper.load(ref, plgpu.Layout.WGMMA.reduce(axis))


def _product(x: Any, y: Any, shape: tuple[int, int], transpose: bool = False) -> Array:
    """``x y`` or ``x y^T`` of tiles in shared memory."""

    def body(acc: Any) -> Array:
        plgpu.wgmma(acc, x, plgpu.transpose_ref(y, (1, 0)) if transpose else y)
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def _add_product(total: Array, x: Array, y: Any) -> Array:
    """``total + x y``; x in registers, y in shared memory."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, x, y))(plgpu.ACC.init(total))


def _scores(shape: Shape, s: Array, block: Any) -> Array:
    """Base-2 scores ``[rows, block_k]`` of products; keys past the end count for nothing."""
    s = s * (shape.scale * tile.LOG2E)
    if shape.keys % shape.block_k == 0:
        return s
    index = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(block * shape.block_k + index < shape.keys, s, tile.MASKED)


def _kernel(body: Any, types: Any, scratch: Any, grid: tuple[int, int], readers: int) -> Any:
    return hopper.kernel(body, types, scratch, dict(zip(("block", "head"), grid)), readers + 1)


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    supported(shape, q.dtype)
    q, k, v = fold_queries(shape, q), fold_keys(shape, k), fold_keys(shape, v)
    table = fold_table(shape, table)
    readers, rows = _readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(2 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, k_ref, v_ref, table_ref, o_ref, lse_ref, tiles, ring, q_full):
        own, lse_own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        i, h, wg = (lax.axis_index(name) for name in ("block", "head", "wg"))

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine, start = own.at[wg], i * shape.block_q + wg * rows
            plgpu.copy_gmem_to_smem(q_ref.at[h, pl.ds(start, rows)], mine, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            def step(t, buffers, carry):
                acc, top, total = carry
                block = table_ref[h, i, t] if shape.keys % block_k else None
                s = _product(mine, buffers[0], (rows, block_k), transpose=True)
                p, decay, top, total = tile.softmax_step(_scores(shape, s, block), top, total, ROWS)
                acc = acc * ROWS.spread(decay, acc)
                return _add_product(acc, p.astype(q.dtype), buffers[1]), top, total

            start_values = hopper.zeros(rows, width), _row(tile.MASKED, rows), _row(0.0, rows)
            acc, top, total = stream.each(steps, step, start_values)
            plgpu.commit_smem()  # other warps may still multiply what it holds
            mine[...] = (acc / ROWS.spread(total, acc)).astype(q.dtype)
            lse_own.at[wg][...] = tile.log_sum(top, total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, o_ref.at[h, pl.ds(start, rows)])
            plgpu.copy_smem_to_gmem(lse_own.at[wg], lse_ref.at[h, pl.ds(start, rows)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            stream.fill(steps, _listed(table_ref.at[h, i], k_ref.at[h], v_ref.at[h], block_k))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        hopper.tiles(readers, rows, width, dtype=q.dtype),
        plgpu.SMEM((readers, rows), jnp.float32),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
    )
    types = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    scratch = [tiles, ring, plgpu.Barrier(num_barriers=readers)]
    run = _kernel(body, types, scratch, (table.shape[1], table.shape[0]), readers)
    o, lse = run(q, k, v, table)
    return unfold_queries(shape, o), unfold_queries(shape, lse)


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
    keys = fold_keys(shape, k), fold_keys(shape, v)
    per_query = q, do.astype(q.dtype), lse * tile.LOG2E, row_terms(o, do, dlse)
    queries = [fold_queries(shape, x) for x in per_query]
    table = fold_table(shape, table)
    dk, dv = _dkv(shape, table, queries, keys)
    return (
        unfold_queries(shape, _dq(shape, table, queries, keys)),
        unfold_keys(shape, dk.astype(q.dtype)),
        unfold_keys(shape, dv.astype(q.dtype)),
    )


def _dq(shape: Shape, table: Array, queries: Sequence[Array], keys: Sequence[Array]) -> Array:
    dtype = queries[0].dtype
    readers, rows = _readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(4 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, do_ref, lse_ref, terms_ref, k_ref, v_ref, table_ref, dq_ref, tiles, ring, full):
        *own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        i, h, wg = (lax.axis_index(name) for name in ("block", "head", "wg"))

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            at = h, pl.ds(i * shape.block_q + wg * rows, rows)
            q, do, lse, terms = (x.at[wg] for x in own)
            for source, mine in zip((q_ref, do_ref, lse_ref, terms_ref), (q, do, lse, terms)):
                plgpu.copy_gmem_to_smem(source.at[at], mine, full.at[wg])
            plgpu.barrier_wait(full.at[wg])
            lse, terms = _load(lse, 1), _load(terms, 1)

            def step(t, buffers, carry):
                acc, lse, terms = carry
                block = table_ref[h, i, t] if shape.keys % block_k else None
                s = _product(q, buffers[0], (rows, block_k), transpose=True)
                dp = _product(do, buffers[1], (rows, block_k), transpose=True)
                _, ds = tile.score_gradient(_scores(shape, s, block), dp, lse, terms, ROWS)
                return _add_product(acc, ds.astype(dtype), buffers[0]), lse, terms

            acc, _, _ = stream.each(steps, step, (hopper.zeros(rows, width), lse, terms))
            plgpu.commit_smem()  # other warps may still multiply what it holds
            q[...] = (acc * shape.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            stream.fill(steps, _listed(table_ref.at[h, i], k_ref.at[h], v_ref.at[h], block_k))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        *[hopper.tiles(readers, rows, width, dtype=dtype)] * 2,
        *[plgpu.SMEM((readers, rows), jnp.float32)] * 2,
        *[hopper.tiles(slots, block_k, width, dtype=dtype)] * 2,
    )
    types = jax.ShapeDtypeStruct(queries[0].shape, dtype)
    scratch = [tiles, ring, plgpu.Barrier(num_arrivals=4, num_barriers=readers)]
    run = _kernel(body, types, scratch, (table.shape[1], table.shape[0]), readers)
    return run(*queries, *keys, table)


def _dkv(
    shape: Shape, table: Array, queries: Sequence[Array], keys: Sequence[Array]
) -> tuple[Array, Array]:
    """Sums per segment of the table read by key block, added up afterwards in float32."""
    dtype, heads = queries[0].dtype, table.shape[0]
    readers, rows = _readers(shape.block_k)
    width, block_q, block_k = shape.width, shape.block_q, shape.block_k
    cut = functools.partial(segments, key_blocks=shape.key_blocks, length=SEGMENT)
    column, pairs, count = jax.vmap(cut)(table.reshape(heads, -1))
    pairs = pairs // shape.entries  # a pair (r, i, t) belongs to query block r * N_q + i
    size = column.shape[1]
    slots = hopper.slots(8 * block_k * width, (4 * width + 8) * block_q, SEGMENT)

    def body(q_ref, do_ref, lse_ref, terms_ref, k_ref, v_ref, column_ref, pairs_ref, count_ref,
             dk_ref, dv_ref, own, buffers, ring, full):  # fmt: skip
        stream = hopper.Ring(buffers, *ring, slots, loaded=True)
        g, h, wg = (lax.axis_index(name) for name in ("block", "head", "wg"))
        steps = count_ref[h, g]

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            k, v, out = (x.at[wg] for x in own)
            at = h, pl.ds(column_ref[h, g] * block_k + wg * rows, rows)
            plgpu.copy_gmem_to_smem(k_ref.at[at], k, full.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[at], v, full.at[wg])
            plgpu.barrier_wait(full.at[wg])

            def step(t, buffers, carry):
                del t
                dk, dv = carry
                q, do, lse, terms = buffers
                lse, terms = _load(lse, 0), _load(terms, 0)
                # Keys past the end only touch rows of dk and dv that are cut off.
                s = _product(k, q, (rows, block_q), transpose=True) * (shape.scale * tile.LOG2E)
                dp = _product(v, do, (rows, block_q), transpose=True)
                p, ds = tile.score_gradient(s, dp, lse, terms, COLUMNS)
                dv = _add_product(dv, p.astype(dtype), do)
                return _add_product(dk, ds.astype(dtype), q), dv

            dk, dv = stream.each(
                steps, step, (hopper.zeros(rows, width), hopper.zeros(rows, width))
            )
            at = h, g, pl.ds(wg * rows, rows)
            for value, ref in ((dk * shape.scale, dk_ref), (dv, dv_ref)):
                out[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, ref.at[at])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            def sources(t):
                at = h, pl.ds(pairs_ref[h, g, t] * block_q, block_q)
                return [x.at[at] for x in (q_ref, do_ref, lse_ref, terms_ref)]

            stream.fill(steps, sources)

    own = (
        *[hopper.tiles(readers, rows, width, dtype=dtype)] * 2,
        hopper.float_tiles(readers, rows, width),
    )
    buffers = (
        *[hopper.tiles(slots, block_q, width, dtype=dtype)] * 2,
        *[plgpu.SMEM((slots, block_q), jnp.float32)] * 2,
    )
    ring = hopper.ring_barriers(4, readers, slots)
    types = (jax.ShapeDtypeStruct((heads, size, block_k, width), jnp.float32),) * 2
    scratch = [own, buffers, ring, plgpu.Barrier(num_arrivals=2, num_barriers=readers)]
    run = _kernel(body, types, scratch, (size, heads), readers)
    parts = run(*queries, *keys, column, pairs, count)

    def add(column: Array, x: Array) -> Array:
        total = jnp.zeros((shape.key_blocks, block_k, width), jnp.float32)
        total = total.at[column].add(x, indices_are_sorted=True)
        return total.reshape(-1, width)

    return tuple(jax.vmap(add)(column, x) for x in parts)
