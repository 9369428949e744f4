"""The op on Hopper GPUs: one warpgroup copies the listed blocks in, others multiply.

A program owns ``block_q`` queries of a head (for keys' gradients: one segment of a key block) and
walks its row of the table: the copying warpgroup reads the block's index and starts the copies of
keys and values into a ring of buffers, the others wait for a buffer, use it and hand it back.
Heads are copied from ``[B, T, N, H]`` and back, wherever they lie; numbers per query are
``[B, N, T']``, in whole blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import hopper
from flora_jax.kernels.block_sparse_attention import program, tile
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


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    supported(shape, q.dtype)
    q, k, v = hopper.whole(q, shape.block_q), *(hopper.whole(x, shape.block_k) for x in (k, v))
    readers, rows = program.readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(2 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, k_ref, v_ref, table_ref, o_ref, lse_ref, tiles, ring, q_full):
        own, lse_own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        b, n, i, wg = program.place()

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            at, row = program.queries(b, n, i * shape.block_q + wg * rows, rows)
            mine = own.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[at], mine, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            def step(t, buffers, carry):
                acc, top, total = carry
                block = table_ref[b, n, i, t] if shape.keys % block_k else None
                s = program.product(mine, buffers[0], (rows, block_k), transpose=True)
                s = program.scores(shape, s, block)
                p, decay, top, total = tile.softmax_step(s, top, total, ROWS)
                acc = acc * ROWS.spread(decay, acc)
                return program.add_product(acc, p.astype(q.dtype), buffers[1]), top, total

            start_values = hopper.zeros(rows, width), *program.row_values(rows, tile.MASKED, 0.0)
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
            stream.fill(steps, program.listed(shape, b, n, i, table_ref, k_ref, v_ref))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        hopper.tiles(readers, rows, width, dtype=q.dtype),
        plgpu.SMEM((readers, rows), jnp.float32),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
        hopper.tiles(slots, block_k, width, dtype=q.dtype),
    )
    scratch = [tiles, ring, plgpu.Barrier(num_barriers=readers)]
    types = program.like(q), program.row_type(shape)
    run = program.kernel(
        shape, body, types, scratch, shape.query_blocks, shape.heads, readers + 1,
        products=2, tokens=2 * (shape.rows + shape.pairs * block_k), numbers=shape.rows,
    )  # fmt: skip
    o, lse = run(q, k, v, table)
    return o[:, : shape.queries], by_token(lse, shape.queries)


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
    readers, rows = program.readers(shape.block_q)
    width, block_k, steps = shape.width, shape.block_k, shape.entries
    slots = hopper.slots(4 * shape.block_q * width, 4 * block_k * width, steps)

    def body(q_ref, do_ref, o_ref, lse_ref, dlse_ref, k_ref, v_ref, table_ref,
             dq_ref, terms_ref, tiles, ring, full, q_full):  # fmt: skip
        *own, keys, values = tiles
        stream = hopper.Ring((keys, values), *ring, slots, loaded=False)
        b, n, i, wg = program.place()

        @pl.when(wg < readers)
        def _():
            plgpu.set_max_registers(232, action="increase")
            at, row = program.queries(b, n, i * shape.block_q + wg * rows, rows)
            q, do, lse, terms = (x.at[wg] for x in own)
            # o lies where q will: it is needed once.
            sources = o_ref.at[at], do_ref.at[at], lse_ref.at[row], dlse_ref.at[row]
            for source, mine in zip(sources, (q, do, lse, terms)):
                plgpu.copy_gmem_to_smem(source, mine, full.at[wg])
            plgpu.barrier_wait(full.at[wg])
            o, cotangent = (hopper.load(x, plgpu.Layout.WGMMA).astype(jnp.float32) for x in (q, do))
            subtract = ROWS.reduce(jnp.sum, o * cotangent) - program.load(terms, 1)
            terms[...] = subtract
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(terms, terms_ref.at[row])
            plgpu.copy_gmem_to_smem(q_ref.at[at], q, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            def step(t, buffers, carry):
                acc, lse, terms = carry
                block = table_ref[b, n, i, t] if shape.keys % block_k else None
                s = program.product(q, buffers[0], (rows, block_k), transpose=True)
                dp = program.product(do, buffers[1], (rows, block_k), transpose=True)
                p = tile.weights(program.scores(shape, s, block), lse, ROWS)
                ds = tile.score_gradient(p, dp, terms, ROWS)
                return program.add_product(acc, ds.astype(dtype), buffers[0]), lse, terms

            start_values = hopper.zeros(rows, width), program.load(lse, 1), subtract
            acc, _, _ = stream.each(steps, step, start_values)
            plgpu.commit_smem()  # other warps may still multiply what it holds
            q[...] = (acc * shape.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == readers)
        def _():
            stream.fill(steps, program.listed(shape, b, n, i, table_ref, k_ref, v_ref))

    ring = hopper.ring_barriers(2, readers, slots)
    tiles = (
        *[hopper.tiles(readers, rows, width, dtype=dtype)] * 2,
        *[plgpu.SMEM((readers, rows), jnp.float32)] * 2,
        *[hopper.tiles(slots, block_k, width, dtype=dtype)] * 2,
    )
    full = plgpu.Barrier(num_arrivals=4, num_barriers=readers)
    scratch = [tiles, ring, full, plgpu.Barrier(num_barriers=readers)]
    types = program.like(q), program.row_type(shape)
    run = program.kernel(
        shape, body, types, scratch, shape.query_blocks, shape.heads, readers + 1, products=3,
        tokens=4 * shape.rows + 2 * shape.pairs * block_k, numbers=3 * shape.rows,
    )  # fmt: skip
    return run(q, *others, table)


def _dkv(shape: Shape, table: Array, *arrays: Array) -> tuple[Array, Array]:
    """The gradients of keys and values: sums per segment of the table read by key block, added up
    in float32.

    Args:
      arrays: q, do, lse2, what ``_dq`` gives, k, v.
    """
    k, v = arrays[-2:]
    dtype, lead = k.dtype, (shape.batch, shape.key_heads)
    readers, rows = program.readers(shape.block_k)
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
        b, h, g, wg = program.place()
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
                s = program.product(k, q, (rows, QUERIES), transpose=True)
                s = s * (shape.scale * tile.LOG2E)
                p = tile.weights(s, program.load(lse, 0), COLUMNS)
                dv = program.add_product(dv, p.astype(dtype), do)
                dp = program.product(v, do, (rows, QUERIES), transpose=True)
                ds = tile.score_gradient(p, dp, program.load(terms, 0), COLUMNS)
                return program.add_product(dk, ds.astype(dtype), q), dv

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
                pair, half = program.split(t, halves)
                r, i = program.split(pairs_ref[b, h, g, pair], shape.query_blocks)
                n = h * shape.repeats + r
                at, row = program.queries(b, n, (i * halves + half) * QUERIES, QUERIES)
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
    copied, keys = 2 * shape.pairs * shape.block_q, 2 * math.prod(types[0].shape[:-1])
    run = program.kernel(
        shape, body, types, scratch, size, shape.key_heads, readers + 1, products=4,
        tokens=copied + 3 * keys, numbers=copied,
    )  # fmt: skip
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
    readers, rows = program.readers(shape.block_k)

    def body(dk_parts, dv_parts, first_ref, number_ref, dk_ref, dv_ref, out):
        b, h, i, _ = program.place()
        block, part = program.split(i, readers)
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
    types = tuple(map(program.like, like))
    blocks = shape.key_blocks * readers
    tokens = 4 * math.prod(parts[0].shape[:-1]) + 2 * like[0].size // shape.width
    run = program.kernel(shape, body, types, scratch, blocks, shape.key_heads, 1, tokens=tokens)
    return run(*parts, first, number)
