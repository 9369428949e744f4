"""The products on Hopper GPUs: weights are unpacked into registers, as the matrix unit takes them.

The unit reads its first factor, 64 rows at a time, from registers and the second, 8 to 256
columns, from shared memory. So a program computes the transpose of its result: 64 columns of the
weight (64 of its rows, in the gradient by x) times the few rows of x. One warpgroup copies packed
weights, their scales and the matching pieces of x into a ring of buffers; one or two others
unpack, multiply and scale. Codes of 4 and 8 bits are exact in bfloat16, those of quantised rows
too: every format is a product of 16-bit numbers with float32 sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import dispatch, hopper
from flora_jax.kernels.low_bit_matmul import cuts, tiles
from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts
from flora_jax.kernels.low_bit_matmul.cuts import Cut
from flora_jax.kernels.low_bit_matmul.packing import LowBit, Rows

WGMMA, TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
DOWN, ALONG = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Vectors with a number per row and per column of a tile in registers."""
TILE = 64
"""Rows of the matrix unit's first factor, per reading warpgroup."""
AXES = ("weight", "row", "split")
"""Of the grid: blocks of the weight, blocks of rows of x, parts of the sum."""


def forward(
    x: Array | Rows,
    w: LowBit,
    bias: Array | None,
    *,
    activation: str | None,
    dtype: Any,
    placement: str | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """``activation(x w + bias)``; see reference.py.

    ``placement``: default ``partial``. Quantised rows are multiplied as 16-bit numbers, which is
    exact: the products of a step of int8 sum up to less than 2^24, int32 adds a group's steps.

    Raises:
      NotImplementedError: float32 rows, or shapes that no block fits.
    """
    rows, x_scale = _rows(x)
    m = rows.shape[0]
    integer = isinstance(x, Rows) and x.values.dtype == jnp.int8
    cut = cuts.forward(m, w, blocks, whole_groups=integer)
    inputs = {"values": w.values, "x": _pad(rows, cut), **_groups(w)}
    if cut.splits > 1:
        y = _forward(w, cut, inputs, integer, placement, None, jnp.float32)
        y = y.sum(0)[:m]
        return tiles.finish(y, x_scale, None if bias is None else bias[None], activation, dtype)
    if x_scale is not None:
        inputs["x_scale"] = _pad(x_scale, cut)[:, 0]
    if bias is not None:
        inputs["bias"] = bias.astype(jnp.float32)
    return _forward(w, cut, inputs, integer, placement, activation, dtype)[0, :m]


def _forward(
    w: LowBit,
    cut: Cut,
    inputs: dict[str, Array],
    integer: bool,
    placement: str | None,
    activation: str | None,
    dtype: Any,
) -> Array:
    """``[splits, rows of x, N]``; with x_scale and bias where the inputs have them."""
    compute, count = inputs["x"].dtype, parts(w)
    per_group = cuts.group_steps(w, cut.k) if integer else 1

    def sources(refs: Any, t: Any, at: Any) -> list[Any]:
        j, i, split = at
        stored, columns = (split * cut.steps + t) * cut.k, pl.ds(j * cut.n, cut.n)
        rows = [cuts.weight_row(w, stored, part) for part in range(count)]
        x = [refs["x"].at[pl.ds(i * cut.m, cut.m), pl.ds(row, cut.k)] for row in rows]
        values = refs["values"].at[pl.ds(stored, cut.k), columns]
        return [values, *x, *_group_sources(w, refs, rows, columns)]

    def read(refs: Any, out_ref: Any, out: Any, each: Any, at: Any, wg: Any) -> None:
        j, i, split = at
        mine = pl.ds(wg * TILE, TILE)

        def step(t: Any, buffers: Any, carry: Any) -> Any:
            values, *buffers = buffers
            x, groups = buffers[:count], _held(buffers[count:], count, mine)
            packed = hopper.load(values.at[:, mine].transpose((1, 0)), TRANSPOSED)
            total, *sums = carry
            parted = []
            for part, codes in enumerate(_codes(w, packed, compute)):
                codes, unit = plgpu.layout_cast(codes, WGMMA), tiles.UNITS[part]
                scale, zero = _load(groups[part], DOWN)
                codes = tiles.centred(codes, zero, unit, axis=0)
                if placement == "weight":
                    codes = tiles.rescaled(codes, scale * unit, axis=0)
                    total += _product(codes, x[part])
                elif integer:
                    parted.append((_product(codes, x[part]) * unit, scale))
                else:
                    y = _product(codes, x[part])
                    total += y * tiles.along(scale * unit, y.shape, 0)
            if integer and cuts.one_group(w):
                (low, scale), (high, _) = parted
                parted = [(low + high, scale)]
            last = lax.rem(t + 1, jnp.array(per_group, t.dtype)) == 0
            for at, (y, scale) in enumerate(parted):
                if sums:
                    y, sums[at] = tiles.whole_group(y, sums[at], last)
                total += y * tiles.along(scale, y.shape, 0)
            return total, *sums

        total = hopper.zeros(TILE, cut.m)
        # int32 of each group that a step touches; where a step is a group, float32 is exact.
        groups = 0 if per_group == 1 else 1 if cuts.one_group(w) else count
        sums = [total.astype(jnp.int32)] * groups
        y, *_ = each(step, (total, *sums))
        rows, columns = pl.ds(i * cut.m, cut.m), pl.ds(j * cut.n + wg * TILE, TILE)
        ends = _ends(refs, rows, columns, y.shape)
        _store(_finish(y, *ends, activation, dtype), out, out_ref.at[split, rows, columns])

    buffers = [
        _stored(w, cut),
        *[((cut.m, cut.k), compute, _swizzled(cut.k, compute))] * count,
        *_group_buffers(w, count, cut.n),
    ]
    shape = (cut.splits, cut.m * cut.rows, w.shape[-1])
    grid = (w.shape[-1] // cut.n, cut.rows, cut.splits)
    return _run(inputs, (shape, dtype), cut, grid, cut.n // TILE, buffers, sources, read)


def dx(dy: Array, w: LowBit, *, dtype: Any, blocks: Blocks | None = None) -> Array:
    """``dy w^T`` with w rounded to dy's dtype, ``[M, K]``.

    Raises:
      NotImplementedError: float32 dy, or shapes that no block fits.
    """
    dy, _ = _rows(dy)
    m, compute, count = dy.shape[0], dy.dtype, parts(w)
    cut = cuts.dx(m, w, blocks)
    inputs = {"values": w.values, "x": _pad(dy, cut), **_groups(w)}
    alone = cut.splits == 1

    def weight_rows(j: Any) -> list[Any]:
        return [cuts.weight_row(w, j * cut.k, part) for part in range(count)]

    def sources(refs: Any, t: Any, at: Any) -> list[Any]:
        j, i, split = at
        columns = pl.ds((split * cut.steps + t) * cut.n, cut.n)
        return [
            refs["values"].at[pl.ds(j * cut.k, cut.k), columns],
            refs["x"].at[pl.ds(i * cut.m, cut.m), columns],
            *_group_sources(w, refs, weight_rows(j), columns),
        ]

    def read(refs: Any, out_ref: Any, out: Any, each: Any, at: Any, wg: Any) -> None:
        j, i, split = at

        def step(t: Any, buffers: Any, totals: Any) -> Any:
            del t
            values, dy, *buffers = buffers
            groups = _held(buffers, count, pl.ds(0, cut.n))
            packed = hopper.load(values.at[pl.ds(wg * TILE, TILE)], WGMMA)
            after = []
            for part, codes in enumerate(_codes(w, packed, compute)):
                unit = tiles.UNITS[part]
                scale, zero = _load(groups[part], ALONG)
                codes = tiles.centred(codes, zero, unit, axis=1)
                codes = tiles.rescaled(codes, scale * unit, axis=1)
                after.append(_product(codes, dy, totals[part]))
            return tuple(after)

        totals = each(step, tuple(hopper.zeros(TILE, cut.m) for _ in range(count)))
        for y, row in zip(totals, weight_rows(j)):
            target = pl.ds(i * cut.m, cut.m), pl.ds(row + wg * TILE, TILE)
            _store(y, out, out_ref.at[split, *target])

    buffers = [
        _stored(w, cut),
        ((cut.m, cut.n), compute, _swizzled(cut.n, compute)),
        *_group_buffers(w, count, cut.n),
    ]
    out = (cut.splits, cut.m * cut.rows, w.shape[0]), dtype if alone else jnp.float32
    grid = (w.shape[0] // count // cut.k, cut.rows, cut.splits)
    y = _run(inputs, out, cut, grid, cut.k // TILE, buffers, sources, read)
    return (y[0] if alone else y.sum(0).astype(dtype))[:m]


def _run(
    inputs: dict[str, Array],
    out: tuple[tuple[int, ...], Any],
    cut: Cut,
    grid: tuple[int, int, int],
    readers: int,
    buffers: Sequence[tuple[tuple[int, ...], Any, Any]],
    sources: Callable[..., list[Any]],
    read: Callable[..., None],
) -> Array:
    """The kernel: a warpgroup copies ``sources`` into ``buffers``, ``readers`` others ``read``."""
    shape, dtype = out
    dtype = jnp.dtype(dtype)
    each_bytes = sum(math.prod(s) * jnp.dtype(d).itemsize for s, d, _ in buffers)
    out_bytes = readers * cut.m * TILE * dtype.itemsize
    slots = hopper.slots(out_bytes, each_bytes, cut.steps)
    registers = 40 if readers > 1 else None

    def body(*args: Any) -> None:
        refs = dict(zip(inputs, args))
        out_ref, out, ring, barriers = args[len(inputs) :]
        stream = hopper.Ring(ring, *barriers, slots, loaded=True)
        at, wg = [lax.axis_index(name) for name in AXES], lax.axis_index("wg")

        @pl.when(wg < readers)
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(232, action="increase")
            each = lambda step, carry: stream.each(cut.steps, step, carry)
            read(refs, out_ref, out.at[wg], each, at, wg)

        @pl.when(wg == readers)
        def _() -> None:
            stream.fill(cut.steps, lambda t: sources(refs, t, at), registers)

    in_ring = [
        plgpu.SMEM((slots, *piece), of, **({"transforms": turns} if turns else {}))
        for piece, of, turns in buffers
    ]
    scratch = [
        plgpu.SMEM((readers, cut.m, TILE), dtype, transforms=_swizzled(TILE, dtype)),
        in_ring,
        hopper.ring_barriers(len(buffers), readers, slots),
    ]
    types, places = jax.ShapeDtypeStruct(shape, dtype), dict(zip(AXES, grid))
    # Serving computes the activation that training does.
    run = hopper.kernel(body, types, scratch, places, readers + 1, approximate=False)
    return run(*inputs.values())


def _rows(x: Array | Rows) -> tuple[Array, Array | None]:
    """Rows in 16 bits, as they are or the differences of codes to zero points, and their scales."""
    if isinstance(x, Rows):
        values = x.values.astype(jnp.bfloat16)
        return (values if x.zero is None else values - x.zero.astype(jnp.bfloat16)), x.scale
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"bfloat16, float16 or quantised rows, not {x.dtype}")
    return x, None


def _pad(rows: Array, cut: Cut) -> Array:
    """With rows of zeros up to whole blocks."""
    missing = cut.m * cut.rows - rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _groups(w: LowBit) -> dict[str, Array]:
    """Scales and zero points ``[groups, N]``; 64 numbers of 8 bits are too few for a copy."""
    full = jnp.broadcast_to(w.scale, (w.groups, w.shape[-1]))
    return {"scale": full} | ({} if w.zero is None else {"zero": w.zero.astype(jnp.bfloat16)})


def _group_sources(w: LowBit, refs: Any, rows: Sequence[Any], columns: Any) -> list[Any]:
    """Scales, and zero points if any, of the groups of these rows."""
    group = lambda row: lax.div(row, w.group) if w.groups > 1 else 0
    names = [name for name in ("scale", "zero") if name in refs]
    return [refs[name].at[group(row), columns] for name in names for row in rows]


def _group_buffers(w: LowBit, count: int, n: int) -> list[Any]:
    scale, zero = ((n,), jnp.float32, None), ((n,), jnp.bfloat16, None)
    return [scale] * count + ([] if w.zero is None else [zero] * count)


def _held(buffers: Sequence[Any], count: int, at: Any) -> list[tuple[Any, Any]]:
    """Scale and zero point (or None) of each part of a stored number."""
    scale, zero = buffers[:count], buffers[count:] or [None] * count
    return [(s.at[at], None if z is None else z.at[at]) for s, z in zip(scale, zero)]


def _load(group: tuple[Any, Any], layout: Any) -> tuple[Array, Array | None]:
    scale, zero = group
    return hopper.load(scale, layout), None if zero is None else hopper.load(zero, layout)


def _stored(w: LowBit, cut: Cut) -> tuple[tuple[int, int], Any, Any]:
    """Buffer of packed weights: 64 bytes of 8 rows together."""
    return (cut.k, cut.n), w.values.dtype, _swizzled(TILE, jnp.int8)


def _swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """Transforms of a tile in shared memory whose rows hold a multiple of so many numbers."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _codes(w: LowBit, packed: Array, dtype: Any) -> tuple[Array, ...]:
    if w.format == "int4":
        return tiles.halves(packed, dtype)
    if w.format == "int8":
        return (packed.astype(dtype),)
    return (tiles.as_float(packed, dtype),)


def _product(codes: Array, x: Any, total: Array | None = None) -> Array:
    """``total + codes x^T``; codes in registers, x ``[m, k]`` in shared memory."""
    if dispatch.interpret_mode():
        # jax's interpreter multiplies what is in shared memory only.
        y = tiles.dot(codes, x[...], transpose=True)
        return y if total is None else total + y
    x = x.transpose((1, 0))
    if total is not None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, codes, x))(plgpu.ACC.init(total))

    def fresh(acc: Any) -> Array:
        plgpu.wgmma(acc, codes, x)
        return acc[...]

    return pl.run_scoped(fresh, plgpu.ACC((codes.shape[0], x.shape[1]), jnp.float32))


def _ends(refs: Any, rows: Any, columns: Any, shape: tuple[int, int]) -> list[Array | None]:
    """The scales of rows and the bias, spread over the transposed result."""
    out = []
    for name, at, layout, axis in (("x_scale", rows, ALONG, 1), ("bias", columns, DOWN, 0)):
        if name in refs:
            vector = hopper.load(refs[name].at[at], layout, shared=False)
            out.append(tiles.along(vector, shape, axis))
        else:
            out.append(None)
    return out


def _finish(y: Array, x_scale: Any, bias: Any, activation: str | None, dtype: Any) -> Array:
    if activation != "relu":
        return tiles.finish(y, x_scale, bias, activation, dtype)
    # jax.nn.relu has a gradient of its own, which does not lower.
    return jnp.maximum(tiles.finish(y, x_scale, bias, None, jnp.float32), 0.0).astype(dtype)


def _store(y: Array, out: Any, target: Any) -> None:
    """``y^T``, through shared memory."""
    out.transpose((1, 0))[...] = plgpu.layout_cast(y.astype(out.dtype), TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, target)
    plgpu.wait_smem_to_gmem(0)
