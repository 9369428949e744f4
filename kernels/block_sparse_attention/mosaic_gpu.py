"""The op on Hopper GPUs: one warpgroup copies the listed blocks in, others multiply.

A program owns ``block_q`` queries of a head (for keys' gradients: one segment of a key block) and
walks its row of the table: the copying warpgroup reads the block's index and starts the copies of
keys and values into a ring of buffers, the others wait for a buffer, use it and hand it back.
Heads are copied from ``[B, T, N, H]`` and back, wherever they lie; numbers per query are
``[B, N, T']``, in whole blocks.
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
    by_token,
    rows_by_head,
    segments,
)

ROWS = tile.Rows(axis=1, keep=False)
COLUMNS = tile.Rows(axis=0, keep=False)
SEGMENT = 32
"""Query blocks per program in the gradient of keys and values: more than most key blocks have, so
that their sums are whole, and few enough that a block which all queries list makes no tail."""
QUERIES = 64
"""Queries per step there: beside two float32 sums there are registers for tiles of no more."""


def supported(shape: Shape, dtype: Any) -> None:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"bfloat16 or float16, not {dtype}")
    if shape.width not in (64, 128):
        raise NotImplementedError(f"heads of width 64 or 128, not {shape.width}")
    if shape.block_q not in (64, 128) or shape.block_k not in (64, 128):
        blocks = f"{shape.block_q} x {shape.block_k}"
        raise NotImplementedError(f"blocks {blocks}: 64 or 128 each")


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


def _kernel(
    shape: Shape, body: Any, types: Any, scratch: Any, blocks: int, heads: int, warpgroups: int
) -> Any:
    grid = {"block": blocks, "head": heads, "batch": shape.batch}
    return hopper.kernel(body, types, scratch, grid, warpgroups)


def _place() -> tuple[Any, ...]:
    return tuple(lax.axis_index(name) for name in ("batch", "head", "block", "wg"))


def _split(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder."""
    by = jnp.array(by, number.dtype)
    return lax.div(number, by), lax.rem(number, by)


def _queries(batch: Any, head: Any, start: Any, size: int) -> tuple[Any, Any]:
    """Where queries of a head lie, and numbers per query."""
    return (batch, pl.ds(start, size), head), (batch, head, pl.ds(start, size))


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _row_type(shape: Shape) -> jax.ShapeDtypeStruct:
    tokens = shape.query_blocks * shape.block_q
    return jax.ShapeDtypeStruct((shape.batch, shape.heads, tokens), jnp.float32)


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    supported(shape, q.dtype)
    q, k, v = hopper.whole(q, shape.block_q), *(hopper.whole(x, shape.block_k) for x in (k, v))
    readers, rows = _readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(2 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, k_ref, v_ref, table_ref, o_ref, lse_ref, tiles, ring, q_full):
        own, lse_own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        b, n, i, wg = _place()

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            at, row = _queries(b, n, i * shape.block_q + wg * rows, rows)
            mine = own.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[at], mine, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            def step(t, buffers, carry):
                acc, top, total = carry
                block = table_ref[b, n, i, t] if shape.keys % block_k else None
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
            plgpu.copy_smem_to_gmem(mine, o_ref.at[at])
            plgpu.copy_smem_to_gmem(lse_own.at[wg], lse_ref.at[row])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            stream.fill(steps, _listed(shape, b, n, i, table_ref, k_ref, v_ref))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        hopper.tiles(readers, rows, width, dtype=q.dtype),
        plgpu.SMEM((readers, rows), jnp.float32),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
    )
    scratch = [tiles, ring, plgpu.Barrier(num_barriers=readers)]
    types = _like(q), _row_type(shape)
    run = _kernel(shape, body, types, scratch, shape.query_blocks, shape.heads, readers + 1)
    o, lse = run(q, k, v, table)
    return o[:, : shape.queries], by_token(lse, shape.queries)


def _listed(
    shape: Shape, batch: Any, head: Any, block: Any, table: Any, *arrays: Any
) -> Callable[[Any], Sequence[Any]]:
    """The blocks of ``arrays``, keys and values, that a row of the table lists at step t."""

    def sources(t: Any) -> Sequence[Any]:
        start = table[batch, head, block, t] * shape.block_k
        at = batch, pl.ds(start, shape.block_k), _split(head, shape.repeats)[0]
        return [x.at[at] for x in arrays]

    return sources


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
    q, do, o = (hopper.whole(x, shape.block_q) for x in (q, do.astype(q.dtype), o))
    k, v = (hopper.whole(x, shape.block_k) for x in (k, v))
    lse2, dlse = (rows_by_head(x, shape.block_q) for x in (lse * tile.LOG2E, dlse))
    dq, terms = _dq(shape, table, q, do, o, lse2, dlse, k, v)
    dk, dv = _dkv(shape, table, q, do, lse2, terms, k, v)
    return dq[:, : shape.queries], dk[:, : shape.keys], dv[:, : shape.keys]


def _dq(shape: Shape, table: Array, q: Array, *others: Array) -> tuple[Array, Array]:
    """The queries' gradient, and what each row subtracts from dP, ``rowsum(o do) - dlse``.

    Args:
      others: do, o, lse2, dlse, k, v.
    """
    dtype = q.dtype
    readers, rows = _readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(4 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, do_ref, o_ref, lse_ref, dlse_ref, k_ref, v_ref, table_ref,
             dq_ref, terms_ref, tiles, ring, full, q_full):  # fmt: skip
        *own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        b, n, i, wg = _place()

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            at, row = _queries(b, n, i * shape.block_q + wg * rows, rows)
            q, do, lse, terms = (x.at[wg] for x in own)
            # o lies where q will: it is needed once.
            sources = o_ref.at[at], do_ref.at[at], lse_ref.at[row], dlse_ref.at[row]
            for source, mine in zip(sources, (q, do, lse, terms)):
                plgpu.copy_gmem_to_smem(source, mine, full.at[wg])
            plgpu.barrier_wait(full.at[wg])
            o, cotangent = (hopper.load(x, plgpu.Layout.WGMMA).astype(jnp.float32) for x in (q, do))
            subtract = ROWS.reduce(jnp.sum, o * cotangent) - _load(terms, 1)
            terms[...] = subtract
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(terms, terms_ref.at[row])
            plgpu.copy_gmem_to_smem(q_ref.at[at], q, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            def step(t, buffers, carry):
                acc, lse, terms = carry
                block = table_ref[b, n, i, t] if shape.keys % block_k else None
                s = _product(q, buffers[0], (rows, block_k), transpose=True)
                dp = _product(do, buffers[1], (rows, block_k), transpose=True)
                p = tile.weights(_scores(shape, s, block), lse, ROWS)
                ds = tile.score_gradient(p, dp, terms, ROWS)
                return _add_product(acc, ds.astype(dtype), buffers[0]), lse, terms

            start_values = hopper.zeros(rows, width), _load(lse, 1), subtract
            acc, _, _ = stream.each(steps, step, start_values)
            plgpu.commit_smem()  # other warps may still multiply what it holds
            q[...] = (acc * shape.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            stream.fill(steps, _listed(shape, b, n, i, table_ref, k_ref, v_ref))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        *[hopper.tiles(readers, rows, width, dtype=dtype)] * 2,
        *[plgpu.SMEM((readers, rows), jnp.float32)] * 2,
        *[hopper.tiles(slots, block_k, width, dtype=dtype)] * 2,
    )
    full = plgpu.Barrier(num_arrivals=4, num_barriers=readers)
    scratch = [tiles, ring, full, plgpu.Barrier(num_barriers=readers)]
    types = _like(q), _row_type(shape)
    run = _kernel(shape, body, types, scratch, shape.query_blocks, shape.heads, readers + 1)
    return run(q, *others, table)


def _dkv(shape: Shape, table: Array, *arrays: Array) -> tuple[Array, Array]:
    """The gradients of keys and values: sums per segment of the table read by key block, added up
    in float32.

    Args:
      arrays: q, do, lse2, what ``_dq`` gives, k, v.
    """
    k, v = arrays[-2:]
    dtype, lead = k.dtype, (shape.batch, shape.key_heads)
    readers, rows = _readers(shape.block_k)
    width, block_k, halves = shape.width, shape.block_k, shape.block_q // QUERIES
    length = shape.steps.queries or SEGMENT
    cut = functools.partial(segments, key_blocks=shape.key_blocks, length=length)
    column, pairs, count = jax.vmap(jax.vmap(cut))(table.reshape(*lead, -1))
    pairs = pairs // shape.entries  # a pair (r, i, t) belongs to query block r * N_q + i
    size = column.shape[2]
    slots = hopper.slots(8 * block_k * width, (4 * width + 8) * QUERIES, length * halves)

    def body(q_ref, do_ref, lse_ref, terms_ref, k_ref, v_ref, column_ref, pairs_ref, count_ref,
             dk_ref, dv_ref, own, buffers, ring, full):  # fmt: skip
        stream = hopper.Ring(buffers, *ring, slots, loaded=True)
        b, h, g, wg = _place()
        steps = count_ref[b, h, g] * halves

        @pl.when((wg < readers) & (steps > 0))
        def _():
            plgpu.set_max_registers(232, action="increase")
            k, v, out = (x.at[wg] for x in own)
            at = b, pl.ds(column_ref[b, h, g] * block_k + wg * rows, rows), h
            plgpu.copy_gmem_to_smem(k_ref.at[at], k, full.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[at], v, full.at[wg])
            plgpu.barrier_wait(full.at[wg])

            def step(t, buffers, carry):
                del t
                dk, dv = carry
                q, do, lse, terms = buffers
                # Keys past the end only touch rows of dk and dv that are cut off.
                s = _product(k, q, (rows, QUERIES), transpose=True) * (shape.scale * tile.LOG2E)
                p = tile.weights(s, _load(lse, 0), COLUMNS)
                dv = _add_product(dv, p.astype(dtype), do)
                dp = _product(v, do, (rows, QUERIES), transpose=True)
                ds = tile.score_gradient(p, dp, _load(terms, 0), COLUMNS)
                return _add_product(dk, ds.astype(dtype), q), dv

            dk, dv = stream.each(
                steps, step, (hopper.zeros(rows, width), hopper.zeros(rows, width))
            )
            at = b, h, g, pl.ds(wg * rows, rows)
            for value, ref in ((dk * shape.scale, dk_ref), (dv, dv_ref)):
                out[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, ref.at[at])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            def sources(t):
                pair, half = _split(t, halves)
                r, i = _split(pairs_ref[b, h, g, pair], shape.query_blocks)
                n = h * shape.repeats + r
                at, row = _queries(b, n, (i * halves + half) * QUERIES, QUERIES)
                return q_ref.at[at], do_ref.at[at], lse_ref.at[row], terms_ref.at[row]

            stream.fill(steps, sources)

    own = (
        *[hopper.tiles(readers, rows, width, dtype=dtype)] * 2,
        hopper.float_tiles(readers, rows, width),
    )
    buffers = (
        *[hopper.tiles(slots, QUERIES, width, dtype=dtype)] * 2,
        *[plgpu.SMEM((slots, QUERIES), jnp.float32)] * 2,
    )
    ring = hopper.ring_barriers(4, readers, slots)
    types = (jax.ShapeDtypeStruct((*lead, size, block_k, width), jnp.float32),) * 2
    scratch = [own, buffers, ring, plgpu.Barrier(num_arrivals=2, num_barriers=readers)]
    run = _kernel(shape, body, types, scratch, size, shape.key_heads, readers + 1)
    parts = run(*arrays, column, pairs, count)
    return _added(shape, parts, column, count, (k, v))


def _added(
    shape: Shape, parts: Sequence[Array], column: Array, count: Array, like: Sequence[Array]
) -> tuple[Array, Array]:
    """``[B, S, K, H]`` of the segments that have pairs; a program per 64 keys."""
    index = jnp.arange(shape.key_blocks, dtype=jnp.int32)
    find = functools.partial(jnp.searchsorted, v=index)
    first = jax.vmap(jax.vmap(find))(column).astype(jnp.int32)
    real = lambda column, count: jnp.zeros_like(index).at[column].add((count > 0).astype(jnp.int32))
    number = jax.vmap(jax.vmap(real))(column, count)
    readers, rows = _readers(shape.block_k)

    def body(dk_parts, dv_parts, first_ref, number_ref, dk_ref, dv_ref, out):
        b, h, i, _ = _place()
        block, part = _split(i, readers)
        start, within = first_ref[b, h, block], pl.ds(part * rows, rows)
        for parts, ref in ((dk_parts, dk_ref), (dv_parts, dv_ref)):

            def add(t, total, parts=parts):
                part = parts.at[b, h, start + t, within]
                return total + hopper.load(part, plgpu.Layout.WGMMA, shared=False)

            zeros = hopper.zeros(rows, shape.width)
            total = lax.fori_loop(0, number_ref[b, h, block], add, zeros)
            out[...] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, ref.at[b, pl.ds(i * rows, rows), h])
            plgpu.wait_smem_to_gmem(0)

    scratch = [hopper.tiles(rows, shape.width, dtype=like[0].dtype)]
    types = tuple(map(_like, like))
    blocks = shape.key_blocks * readers
    run = _kernel(shape, body, types, scratch, blocks, shape.key_heads, 1)
    return run(*parts, first, number)
