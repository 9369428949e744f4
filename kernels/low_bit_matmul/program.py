"""What the Hopper kernels of this op share: programs, their buffers and how they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import costs, dispatch, hopper
from flora_jax.kernels.low_bit_matmul import cuts, tiles
from flora_jax.kernels.low_bit_matmul.blocks import parts
from flora_jax.kernels.low_bit_matmul.cuts import Cut
from flora_jax.kernels.low_bit_matmul.packing import LowBit

WGMMA, TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
DOWN, ALONG = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Vectors with a number per row and per column of a tile in registers."""
TILE = 64
"""Rows of the matrix unit's first factor, per reading warpgroup."""
AXES = ("weight", "row", "split")
"""Of the grid: blocks of the weight, blocks of rows of x, parts of the sum."""
Buffer = tuple[tuple[int, ...], Any, Any]
"""Shape, dtype and transforms of a piece of shared memory."""


def run(
    w: LowBit,
    inputs: dict[str, Array],
    out: tuple[tuple[int, ...], Any],
    cut: Cut,
    grid: tuple[int, int, int],
    readers: int,
    buffers: Sequence[Buffer],
    sources: Callable[..., list[Any]],
    read: Callable[..., None],
    stage: Buffer | None = None,
) -> Array:
    """The kernel: a warpgroup copies ``sources`` into ``buffers``, ``readers`` others ``read``.

    ``stage``: shared memory of each reader's own, ``refs["stage"]``.
    """
    shape, dtype = out
    dtype = jnp.dtype(dtype)
    size = lambda shape, dtype, _: math.prod(shape) * jnp.dtype(dtype).itemsize
    own = [((cut.m, TILE), dtype, swizzled(TILE, dtype)), *([] if stage is None else [stage])]
    fixed, step = readers * sum(size(*buffer) for buffer in own), sum(size(*b) for b in buffers)
    slots = hopper.slots(fixed, step, cut.steps)
    registers = 40 if readers > 1 else None

    def body(*args: Any) -> None:
        refs = dict(zip(inputs, args))
        out_ref, ring, barriers, out, *staged = args[len(inputs) :]
        stream = hopper.Ring(ring, *barriers, slots, loaded=True)
        at, wg = [lax.axis_index(name) for name in AXES], lax.axis_index("wg")

        @pl.when(wg < readers)
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(232, action="increase")
            each = lambda step, carry: stream.each(cut.steps, step, carry)
            mine = {"stage": staged[0].at[wg]} if staged else {}
            read(refs | mine, out_ref, out.at[wg], each, at, wg)

        @pl.when(wg == readers)
        def _() -> None:
            stream.fill(cut.steps, lambda t: sources(refs, t, at), registers)

    def memory(count: int, pieces: Sequence[Buffer]) -> list[Any]:
        turned = lambda turns: {"transforms": turns} if turns else {}
        return [plgpu.SMEM((count, *piece), of, **turned(turns)) for piece, of, turns in pieces]

    barriers = hopper.ring_barriers(len(buffers), readers, slots)
    scratch = [memory(slots, buffers), barriers, *memory(readers, own)]
    types, places = jax.ShapeDtypeStruct(shape, dtype), dict(zip(AXES, grid))
    work = costs.Work(
        flops=2 * shape[1] * math.prod(w.shape),
        bytes=math.prod(grid) * cut.steps * step + math.prod(shape) * dtype.itemsize,
    )
    # Serving computes the activation that training does.
    run = hopper.kernel(
        body, types, scratch, places, readers + 1, work=work, approximate=False
    )
    return run(*inputs.values())


def pad(rows: Array, cut: Cut) -> Array:
    """With rows of zeros up to whole blocks."""
    missing = cut.m * cut.rows - rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def groups(w: LowBit) -> dict[str, Array]:
    """Scales and zero points ``[groups, N]``; 64 numbers of 8 bits are too few for a copy."""
    full = jnp.broadcast_to(w.scale, (w.groups, w.shape[-1]))
    return {"scale": full} | ({} if w.zero is None else {"zero": w.zero.astype(jnp.bfloat16)})


def down(w: LowBit, cut: Cut, refs: Any, t: Any, at: Any) -> list[Any]:
    """What step t of a sum over the rows of the weight copies: weights, x, and their groups."""
    j, i, split = at
    stored, columns = (split * cut.steps + t) * cut.k, pl.ds(j * cut.n, cut.n)
    rows = [cuts.weight_row(w, stored, part) for part in range(parts(w))]
    x = [refs["x"].at[pl.ds(i * cut.m, cut.m), pl.ds(row, cut.k)] for row in rows]
    values = refs["values"].at[pl.ds(stored, cut.k), columns]
    return [values, *x, *group_sources(w, refs, rows, columns)]


def group_sources(w: LowBit, refs: Any, rows: Sequence[Any], columns: Any) -> list[Any]:
    """Scales, and zero points if any, of the groups of these rows."""
    group = lambda row: lax.div(row, w.group) if w.groups > 1 else 0
    names = [name for name in ("scale", "zero") if name in refs]
    return [refs[name].at[group(row), columns] for name in names for row in rows]


def group_buffers(w: LowBit, count: int, n: int) -> list[Any]:
    scale, zero = ((n,), jnp.float32, None), ((n,), jnp.bfloat16, None)
    return [scale] * count + ([] if w.zero is None else [zero] * count)


def held(buffers: Sequence[Any], count: int, at: Any) -> list[tuple[Any, Any]]:
    """Scale and zero point (or None) of each part of a stored number."""
    scale, zero = buffers[:count], buffers[count:] or [None] * count
    return [(s.at[at], None if z is None else z.at[at]) for s, z in zip(scale, zero)]


def load(group: tuple[Any, Any], layout: Any) -> tuple[Array, Array | None]:
    scale, zero = group
    return hopper.load(scale, layout), None if zero is None else hopper.load(zero, layout)


def stored(cut: Cut, dtype: Any) -> Buffer:
    """Of packed weights: 64 bytes of 8 rows together."""
    return (cut.k, cut.n), dtype, swizzled(TILE, jnp.int8)


def swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """Transforms of a tile in shared memory whose rows hold a multiple of so many numbers."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def product(codes: Any, x: Any, total: Array | None = None) -> Array:
    """``total + codes x^T``: int32 of int8, else float32.

    Args:
      codes: ``[., k]`` in registers, or in shared memory.
      x: ``[m, k]`` in shared memory.
    """
    if dispatch.interpret_mode():
        # jax's interpreter has no products in loops, and none of registers.
        y = tiles.dot(codes[...], x[...], transpose=True)
        return y if total is None else total + y
    x = x.transpose((1, 0))
    if total is not None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, codes, x))(plgpu.ACC.init(total))

    def fresh(acc: Any) -> Array:
        plgpu.wgmma(acc, codes, x)
        return acc[...]

    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return pl.run_scoped(fresh, plgpu.ACC((codes.shape[0], x.shape[1]), dtype))


def ends(refs: Any, rows: Any, columns: Any, shape: tuple[int, int]) -> list[Array | None]:
    """The scales of rows and the bias, spread over the transposed result."""
    out = []
    for name, at, layout, axis in (("x_scale", rows, ALONG, 1), ("bias", columns, DOWN, 0)):
        if name in refs:
            vector = hopper.load(refs[name].at[at], layout, shared=False)
            out.append(tiles.along(vector, shape, axis))
        else:
            out.append(None)
    return out


def finish(y: Array, x_scale: Any, bias: Any, activation: str | None, dtype: Any) -> Array:
    if activation != "relu":
        return tiles.finish(y, x_scale, bias, activation, dtype)
    # jax.nn.relu has a gradient of its own, which does not lower.
    return jnp.maximum(tiles.finish(y, x_scale, bias, None, jnp.float32), 0.0).astype(dtype)


def store(y: Array, out: Any, target: Any) -> None:
    """``y^T``, through shared memory."""
    out.transpose((1, 0))[...] = plgpu.layout_cast(y.astype(out.dtype), TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, target)
    plgpu.wait_smem_to_gmem(0)
