"""Products of 8-bit rows on Hopper GPUs by the 8-bit matrix unit.

The unit takes twice as many 8-bit numbers as 16-bit ones, but both factors with K contiguous, and
the weight's columns are contiguous. So a warpgroup reads its 64 columns of a step as in
mosaic_gpu.py, transposed, two columns to a register and a shuffle between two lanes, widened to 16
bits for it; unpacks, and writes them with K contiguous to shared memory of its own, from where they
multiply. That is more work per weight than the 16-bit kernel's and less per product: it pays from a
number of rows of x on (cuts.py).
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import hopper
from flora_jax.kernels.low_bit_matmul import program, tiles
from flora_jax.kernels.low_bit_matmul.blocks import parts
from flora_jax.kernels.low_bit_matmul.cuts import Cut
from flora_jax.kernels.low_bit_matmul.packing import LowBit
from flora_jax.kernels.low_bit_matmul.program import DOWN, TILE, TRANSPOSED, WGMMA


def product(
    w: LowBit, cut: Cut, inputs: dict[str, Array], activation: str | None, dtype: Any
) -> Array:
    """``[splits, rows of x, N]``; with x_scale and bias where the inputs have them.

    int8: int32 sums, of all of K where a column has one scale, else of a group, which is a step.
    float8: float32, added up every 128 rows of K at the latest, for the unit keeps some 14 bits.
    """
    compute, count, alone = inputs["x"].dtype, parts(w), w.groups == 1
    exact = alone and compute == jnp.int8
    if w.values.dtype != jnp.int8:
        inputs = inputs | {"values": lax.bitcast_convert_type(w.values, jnp.int8)}
    if alone:
        rest = {name: value for name, value in inputs.items() if name != "scale"}
        inputs = rest | {"w_scale": inputs["scale"][0]}

    sources = functools.partial(program.down, w, cut)

    def read(refs: Any, out_ref: Any, out: Any, each: Any, at: Any, wg: Any) -> None:
        j, i, split = at
        mine = pl.ds(wg * TILE, TILE)
        # Slices: jax 0.12 cannot close over whole numbers in a product that adds to integers.
        stage = [refs["stage"].at[pl.ds(part * TILE, TILE)] for part in range(count)]

        def step(t: Any, buffers: Any, total: Array) -> Array:
            del t
            values, *buffers = buffers
            x, scales = buffers[:count], buffers[count:]
            packed = hopper.load(values.at[:, mine].transpose((1, 0)), TRANSPOSED)
            wide = plgpu.layout_cast(packed.astype(jnp.int16), WGMMA)
            units = []
            for part, (codes, unit) in enumerate(tiles.eight_bits(wide, w.format, compute)):
                stage[part][...] = codes
                units.append(unit)
            # Also a barrier of the warpgroup: each of its warps multiplies what all have written.
            # The ring's at the end of a step keeps the next writes behind these products.
            plgpu.commit_smem()
            for part, unit in enumerate(units):
                if exact:
                    total = program.product(stage[part], x[part], total)
                    continue
                y = program.product(stage[part], x[part]).astype(jnp.float32)
                if alone:
                    total += y * unit
                else:
                    scale = hopper.load(scales[part].at[mine], DOWN)
                    total += y * tiles.along(scale * unit, y.shape, 0)
            return total

        start = jnp.zeros((TILE, cut.m), jnp.int32 if exact else jnp.float32)
        y = each(step, plgpu.layout_cast(start, WGMMA))
        if exact and count == 2:
            y = y.astype(jnp.float32) * (1 / 16)
        y = y.astype(jnp.float32)
        rows, columns = pl.ds(i * cut.m, cut.m), pl.ds(j * cut.n + wg * TILE, TILE)
        if alone:
            scale = hopper.load(refs["w_scale"].at[columns], DOWN, shared=False)
            y *= tiles.along(scale, y.shape, 0)
        ends = program.ends(refs, rows, columns, y.shape)
        y = program.finish(y, *ends, activation, dtype)
        program.store(y, out, out_ref.at[split, rows, columns])

    turns = program.swizzled(cut.k, jnp.int8)
    buffers = [
        program.stored(cut, jnp.int8),
        *[((cut.m, cut.k), compute, turns)] * count,
        *([] if alone else program.group_buffers(w, count, cut.n)),
    ]
    out = (cut.splits, cut.m * cut.rows, w.shape[-1]), dtype
    grid = (w.shape[-1] // cut.n, cut.rows, cut.splits)
    stage = (count * TILE, cut.k), compute, turns
    return program.run(w, inputs, out, cut, grid, cut.n // TILE, buffers, sources, read, stage)
