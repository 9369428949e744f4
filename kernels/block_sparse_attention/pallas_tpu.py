"""The op on TPU: the table is prefetched as scalars and steers which key blocks are copied in.

A grid step takes several listed blocks, each by an input of its own, since a step has a fixed cost.
The gradient of keys and values walks the table read by key block (``layout.segments``), in a grid
of static size. ``kernels/heads.py`` says how arrays lie, ``bodies_tpu.py`` what a step computes.
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
from flora_jax.kernels.block_sparse_attention import bodies_tpu, sizes, tile
from flora_jax.kernels.block_sparse_attention.layout import (
    Shape,
    fold_queries,
    fold_table,
    segments,
    unfold_queries,
)
from flora_jax.kernels.manual_axes import like, results

Arrays = Sequence[Array]
SMEM = 256 << 10
"""Bytes of prefetched scalars per call; more heads than that are several calls."""


def supported(shape: Shape, dtype: Any) -> None:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"float32 or bfloat16, not {dtype}")
    rows = 32 // jnp.dtype(dtype).itemsize
    if shape.block_q % 128 or shape.block_k % rows:
        raise NotImplementedError(
            f"blocks {shape.block_q} x {shape.block_k}: multiples of 128 x {rows} in {dtype}"
        )
    for kernel in (sizes.forward(shape), sizes.dq(shape)):
        sizes.keys(shape, kernel, dtype)
    sizes.queries(shape, dtype)


def _over_heads(
    call: Callable[..., list[Array]],
    shape: Shape,
    types: Sequence[Any],
    tables: Arrays,
    arrays: Arrays,
) -> list[Array]:
    """``call(scalars, arrays, into)`` for so many heads at a time that the scalars fit SMEM.

    Args:
      call: makes results of ``types``; of several calls each writes its heads' blocks ``into`` what
        those before it have written.
      tables: the scalars beside the heads' places, ``[B K, ...]``.
    """
    count, scalars = len(tables[0]), [_places(shape), *tables]
    each = sum(4 * math.prod(x.shape[1:]) for x in tables)
    fits = [n for n in range(1, count + 1) if count % n == 0 and n * each <= SMEM]
    if not fits:
        raise NotImplementedError(f"a table of {each >> 10} KiB per head; {SMEM >> 10} fit")
    parts = [x.reshape(count // max(fits), -1) for x in scalars]
    if len(parts[0]) == 1:
        return call([x[0] for x in parts], arrays, ())
    start = [like(jax.lax.empty(x.shape, x.dtype), *arrays, *scalars) for x in types]
    return jax.lax.scan(lambda into, some: (call(some, arrays, into), None), start, parts)[0]


def _places(shape: Shape) -> Array:
    """Batch and key head of every row of the folded table, int32 ``[B K, 2]``."""
    row = jnp.arange(shape.batch * shape.key_heads, dtype=jnp.int32)
    return jnp.stack([row // shape.key_heads, row % shape.key_heads], axis=1)


def _at(place: Any, h: Any) -> tuple[Any, Any]:
    return place[2 * h], place[2 * h + 1]


def _padded(table: Array, u: int) -> Array:
    """Rows as long as a multiple of ``u``: the last entry again, which is not copied twice."""
    return jnp.pad(table, ((0, 0), (0, 0), (0, -table.shape[2] % u)), mode="edge")


def _fold_rows(shape: Shape, x: Array) -> Array:
    """``[B, T, N]`` along lanes: ``[B, K, 1, R T']``."""
    return fold_queries(shape, x).reshape(shape.batch, shape.key_heads, 1, -1)


def _row_type(shape: Shape) -> jax.ShapeDtypeStruct:
    tokens = shape.query_blocks * shape.block_q
    return jax.ShapeDtypeStruct(
        (shape.batch, shape.key_heads, 1, shape.repeats * tokens), jnp.float32
    )


def _by_query(shape: Shape, u: int, steps: int) -> tuple[Any, ...]:
    """Blocks per query, per row and per key of the first kernels."""
    blocks = shape.repeats * shape.query_blocks

    def key(r: int) -> pl.BlockSpec:
        def at(h: Any, i: Any, t: Any, place: Any, table: Any) -> tuple[Any, ...]:
            return *_at(place, h), table[((h * blocks + i) * steps + t) * u + r]

        return bodies_tpu.keys(shape).one(at)

    query = bodies_tpu.queries(shape).one(lambda h, i, t, place, _: (*_at(place, h), i))
    row = pl.BlockSpec(
        (None, None, 1, shape.block_q), lambda h, i, t, place, _: (*_at(place, h), 0, i)
    )
    return query, row, [key(r) for r in range(u)]


def _pallas(
    kernel: Any,
    grid: tuple[int, ...],
    specs: tuple[list[Any], Any],
    types: Sequence[Any],
    scratch: Sequence[tuple[int, ...]],
    *,
    scalars: Arrays,
    arrays: Arrays,
    into: Arrays,
    flops: int,
    moved: int,
) -> list[Array]:
    """``pallas_call`` of a grid whose last axis is walked in order, with float32 scratch.

    Args:
      into: what the results overwrite in part; empty: nothing.
      moved: bytes that the grid copies.
    """
    given = len(scalars) + len(arrays)

    def body(*refs: Any) -> None:
        kernel(*refs[:given], *refs[given + len(into) :])

    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[*specs[0], *[pl.BlockSpec(memory_space=pl.ANY)] * len(into)],
            out_specs=specs[1],
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch],
        ),
        out_shape=results(types, scalars, arrays, into),
        input_output_aliases={given + i: i for i in range(len(into))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * (len(grid) - 1)
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        interpret=dispatch.interpret_mode(),
    )
    return list(run(*scalars, *arrays, *into))


def forward(shape: Shape, q: Array, k: Array, v: Array, table: Array) -> tuple[Array, Array]:
    """``(o [B, T, N, H], lse [B, T, N] float32)``."""
    supported(shape, q.dtype)
    u = sizes.keys(shape, sizes.forward(shape), q.dtype)
    table = _padded(fold_table(shape, table), u)
    blocks, steps = table.shape[1], table.shape[2] // u
    query, row, key = _by_query(shape, u, steps)
    of_queries, of_keys = bodies_tpu.queries(shape), bodies_tpu.keys(shape)
    types = [jax.ShapeDtypeStruct(of_queries.shape, q.dtype), _row_type(shape)]
    flat, wide = (1, shape.block_q), shape.width * q.dtype.itemsize

    def call(scalars: Arrays, arrays: Arrays, into: Arrays) -> list[Array]:
        (q, k, v), chunk = arrays, scalars[0].size // 2
        pairs = chunk * blocks * shape.entries * shape.block_k
        rows = chunk * blocks * shape.block_q
        return _pallas(
            functools.partial(bodies_tpu.forward, shape, u),
            (chunk, blocks, steps),
            ([query, *key, *key], [query, row]),
            types,
            [flat, flat, (shape.width, shape.block_q)],
            scalars=scalars,
            arrays=[q, *[k] * u, *[v] * u],
            into=into,
            flops=4 * shape.width * pairs * shape.block_q,
            moved=2 * wide * (pairs + rows) + 4 * rows,
        )

    arrays = [of_queries.split(q), of_keys.split(k), of_keys.split(v)]
    o, lse = _over_heads(call, shape, types, [table], arrays)
    return of_queries.join(o), _unfold_rows(shape, lse)


def _unfold_rows(shape: Shape, x: Array) -> Array:
    """The inverse of ``_fold_rows``."""
    return unfold_queries(shape, x.reshape(shape.batch * shape.key_heads, -1))


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
    of_queries, of_keys = bodies_tpu.queries(shape), bodies_tpu.keys(shape)
    q, do, o = (of_queries.split(x) for x in (q, do.astype(q.dtype), o))
    k, v = of_keys.split(k), of_keys.split(v)
    lse2, dlse = _fold_rows(shape, lse * tile.LOG2E), _fold_rows(shape, dlse)
    table = fold_table(shape, table)
    dq, terms = _dq(shape, table, [q, do, o, lse2, dlse], k, v)
    dk, dv = _dkv(shape, table, [q, do, lse2, terms], k, v)
    return of_queries.join(dq), of_keys.join(dk), of_keys.join(dv)


def _dq(shape: Shape, table: Array, per_query: Arrays, k: Array, v: Array) -> Any:
    """The queries' gradient, and what each row subtracts from dP, ``rowsum(o do) - dlse``."""
    u = sizes.keys(shape, sizes.dq(shape), k.dtype)
    table = _padded(table, u)
    blocks, steps = table.shape[1], table.shape[2] // u
    query, row, key = _by_query(shape, u, steps)
    types = [jax.ShapeDtypeStruct(bodies_tpu.queries(shape).shape, k.dtype), _row_type(shape)]

    def call(scalars: Arrays, arrays: Arrays, into: Arrays) -> list[Array]:
        *per_query, k, v = arrays
        chunk, wide = scalars[0].size // 2, shape.width * k.dtype.itemsize
        pairs = chunk * blocks * shape.entries * shape.block_k
        rows = chunk * blocks * shape.block_q
        return _pallas(
            functools.partial(bodies_tpu.dq, shape, u),
            (chunk, blocks, steps),
            ([query, query, query, row, row, *key, *key], [query, row]),
            types,
            [(shape.width, shape.block_q)],
            scalars=scalars,
            arrays=[*per_query, *[k] * u, *[v] * u],
            into=into,
            flops=6 * shape.width * pairs * shape.block_q,
            moved=wide * (2 * pairs + 4 * rows) + 12 * rows,
        )

    return _over_heads(call, shape, types, [table], [*per_query, k, v])


def _dkv(shape: Shape, table: Array, per_query: Arrays, k: Array, v: Array) -> Any:
    blocks = table.shape[1]
    u = sizes.queries(shape, k.dtype)
    cut = functools.partial(segments, key_blocks=shape.key_blocks, length=u)
    column, pairs, count = jax.vmap(cut)(table.reshape(table.shape[0], -1))
    size = column.shape[1]

    def query(r: int, flat: bool) -> pl.BlockSpec:
        def at(h: Any, g: Any, place: Any, column: Any, rows: Any, _: Any) -> tuple[Any, ...]:
            return *_at(place, h), rows[(h * size + g) * u + r]

        def along(*step: Any) -> tuple[Any, ...]:
            *head, row = at(*step)
            return *head, 0, row

        if flat:
            return pl.BlockSpec((None, None, 1, shape.block_q), along)
        return bodies_tpu.queries(shape).one(at)

    key = bodies_tpu.keys(shape).one(
        lambda h, g, place, column, *_: (*_at(place, h), column[h * size + g])
    )
    queries = [query(r, flat) for flat in (False, False, True, True) for r in range(u)]
    types = [jax.ShapeDtypeStruct(bodies_tpu.keys(shape).shape, k.dtype)] * 2

    def call(scalars: Arrays, arrays: Arrays, into: Arrays) -> list[Array]:
        k, v, *per_query = arrays
        chunk, wide = scalars[0].size // 2, shape.width * k.dtype.itemsize
        pairs = chunk * blocks * shape.entries * shape.block_q
        rows = chunk * shape.key_blocks * shape.block_k
        return _pallas(
            functools.partial(bodies_tpu.dkv, shape, u),
            (chunk, size),
            ([key, key, *queries], [key, key]),
            types,
            [(shape.block_k, shape.width)] * 2,
            scalars=scalars,
            arrays=[k, v, *(x for x in per_query for _ in range(u))],
            into=into,
            flops=8 * shape.width * pairs * shape.block_k,
            moved=(2 * wide + 8) * pairs + 4 * wide * rows,
        )

    # A pair (r, i, t) of the table belongs to query block r * N_q + i.
    tables = [column, pairs // shape.entries, count]
    return _over_heads(call, shape, types, tables, [k, v, *per_query])
