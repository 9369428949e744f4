"""The products on Hopper GPUs: weights are unpacked into registers, as the matrix unit takes them.

The unit reads its first factor, 64 rows at a time, from registers and the second, 8 to 256
columns, from shared memory. So a program computes the transpose of its result: 64 columns of the
weight (64 of its rows, in the gradient by x) times the few rows of x. One warpgroup copies packed
weights, their scales and the matching pieces of x into a ring of buffers; one or two others
unpack, multiply and scale. Codes of 4 and 8 bits are exact in bfloat16, those of quantised rows
too, so these kernels multiply every format as 16-bit numbers with float32 sums; where quantised
rows are many, mosaic_gpu_bytes.py multiplies in 8 bits instead (``cuts.choose``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import dispatch, hopper
from flora_jax.kernels.low_bit_matmul import cuts, mosaic_gpu_bytes, program, tiles
from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts
from flora_jax.kernels.low_bit_matmul.cuts import Cut
from flora_jax.kernels.low_bit_matmul.packing import LowBit, Rows
from flora_jax.kernels.low_bit_matmul.program import ALONG, DOWN, TILE, TRANSPOSED, WGMMA


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

    ``placement``: default ``partial``. Quantised rows multiplied as 16-bit numbers are exact, too:
    the products of a step of int8 sum up to less than 2^24, int32 adds a group's steps.

    Raises:
      NotImplementedError: float32 rows, or shapes that no block fits.
    """
    m, cut = x.shape[0], cuts.choose(x, w, dtype, placement, blocks)
    if cut.bits == 8:
        rows, x_scale = x.values, x.scale
        run = functools.partial(mosaic_gpu_bytes.product, w, cut)
    else:
        rows, x_scale = _rows(x)
        integer = isinstance(x, Rows) and x.values.dtype == jnp.int8
        run = functools.partial(_forward, w, cut, integer, placement)
    dispatch.log("low_bit_matmul", f"mosaic_gpu in {cut.bits} bits")
    inputs = {"values": w.values, "x": program.pad(rows, cut), **program.groups(w)}
    if cut.splits > 1:
        y = run(inputs, None, jnp.float32).sum(0)[:m]
        return tiles.finish(y, x_scale, None if bias is None else bias[None], activation, dtype)
    if x_scale is not None:
        inputs["x_scale"] = program.pad(x_scale, cut)[:, 0]
    if bias is not None:
        inputs["bias"] = bias.astype(jnp.float32)
    return run(inputs, activation, dtype)[0, :m]


def _forward(
    w: LowBit,
    cut: Cut,
    integer: bool,
    placement: str | None,
    inputs: dict[str, Array],
    activation: str | None,
    dtype: Any,
) -> Array:
    """``[splits, rows of x, N]``; with x_scale and bias where the inputs have them."""
    compute, count = inputs["x"].dtype, parts(w)
    per_group = cuts.group_steps(w, cut.k) if integer else 1

    sources = functools.partial(program.down, w, cut)

    def read(refs: Any, out_ref: Any, out: Any, each: Any, at: Any, wg: Any) -> None:
        j, i, split = at
        mine = pl.ds(wg * TILE, TILE)

        def step(t: Any, buffers: Any, carry: Any) -> Any:
            values, *buffers = buffers
            x, groups = buffers[:count], program.held(buffers[count:], count, mine)
            packed = hopper.load(values.at[:, mine].transpose((1, 0)), TRANSPOSED)
            total, *sums = carry
            parted = []
            for part, codes in enumerate(_codes(w, packed, compute)):
                codes, unit = plgpu.layout_cast(codes, WGMMA), tiles.UNITS[part]
                scale, zero = program.load(groups[part], DOWN)
                codes = tiles.centred(codes, zero, unit, axis=0)
                if placement == "weight":
                    codes = tiles.rescaled(codes, scale * unit, axis=0)
                    total += program.product(codes, x[part])
                elif integer:
                    parted.append((program.product(codes, x[part]) * unit, scale))
                else:
                    y = program.product(codes, x[part])
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
        ends = program.ends(refs, rows, columns, y.shape)
        y = program.finish(y, *ends, activation, dtype)
        program.store(y, out, out_ref.at[split, rows, columns])

    buffers = [
        program.stored(cut, w.values.dtype),
        *[((cut.m, cut.k), compute, program.swizzled(cut.k, compute))] * count,
        *program.group_buffers(w, count, cut.n),
    ]
    shape = (cut.splits, cut.m * cut.rows, w.shape[-1])
    grid = (w.shape[-1] // cut.n, cut.rows, cut.splits)
    out = shape, dtype
    return program.run(w, inputs, out, cut, grid, cut.n // TILE, buffers, sources, read)


def dx(dy: Array, w: LowBit, *, dtype: Any, blocks: Blocks | None = None) -> Array:
    """``dy w^T`` with w rounded to dy's dtype, ``[M, K]``.

    Raises:
      NotImplementedError: float32 dy, or shapes that no block fits.
    """
    dy, _ = _rows(dy)
    m, compute, count = dy.shape[0], dy.dtype, parts(w)
    cut = cuts.dx(m, w, blocks)
    inputs = {"values": w.values, "x": program.pad(dy, cut), **program.groups(w)}
    alone = cut.splits == 1

    def weight_rows(j: Any) -> list[Any]:
        return [cuts.weight_row(w, j * cut.k, part) for part in range(count)]

    def sources(refs: Any, t: Any, at: Any) -> list[Any]:
        j, i, split = at
        columns = pl.ds((split * cut.steps + t) * cut.n, cut.n)
        return [
            refs["values"].at[pl.ds(j * cut.k, cut.k), columns],
            refs["x"].at[pl.ds(i * cut.m, cut.m), columns],
            *program.group_sources(w, refs, weight_rows(j), columns),
        ]

    def read(refs: Any, out_ref: Any, out: Any, each: Any, at: Any, wg: Any) -> None:
        j, i, split = at

        def step(t: Any, buffers: Any, totals: Any) -> Any:
            del t
            values, dy, *buffers = buffers
            groups = program.held(buffers, count, pl.ds(0, cut.n))
            packed = hopper.load(values.at[pl.ds(wg * TILE, TILE)], WGMMA)
            after = []
            for part, codes in enumerate(_codes(w, packed, compute)):
                unit = tiles.UNITS[part]
                scale, zero = program.load(groups[part], ALONG)
                codes = tiles.centred(codes, zero, unit, axis=1)
                codes = tiles.rescaled(codes, scale * unit, axis=1)
                after.append(program.product(codes, dy, totals[part]))
            return tuple(after)

        totals = each(step, tuple(hopper.zeros(TILE, cut.m) for _ in range(count)))
        for y, row in zip(totals, weight_rows(j)):
            target = pl.ds(i * cut.m, cut.m), pl.ds(row + wg * TILE, TILE)
            program.store(y, out, out_ref.at[split, *target])

    buffers = [
        program.stored(cut, w.values.dtype),
        ((cut.m, cut.n), compute, program.swizzled(cut.n, compute)),
        *program.group_buffers(w, count, cut.n),
    ]
    out = (cut.splits, cut.m * cut.rows, w.shape[0]), dtype if alone else jnp.float32
    grid = (w.shape[0] // count // cut.k, cut.rows, cut.splits)
    y = program.run(w, inputs, out, cut, grid, cut.k // TILE, buffers, sources, read)
    return (y[0] if alone else y.sum(0).astype(dtype))[:m]


def _rows(x: Array | Rows) -> tuple[Array, Array | None]:
    """Rows in 16 bits, as they are or the differences of codes to zero points, and their scales."""
    if isinstance(x, Rows):
        values = x.values.astype(jnp.bfloat16)
        return (values if x.zero is None else values - x.zero.astype(jnp.bfloat16)), x.scale
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"bfloat16, float16 or quantised rows, not {x.dtype}")
    return x, None


def _codes(w: LowBit, packed: Array, dtype: Any) -> tuple[Array, ...]:
    if w.format == "int4":
        return tiles.halves(packed, dtype)
    if w.format == "int8":
        return (packed.astype(dtype),)
    return (tiles.as_float(packed, dtype),)
