"""The TPU kernels: a step reads a block of packed weights once and multiplies it in VMEM.

Grid (rows, columns, K), K innermost, a float32 accumulator in VMEM. x comes in as two views of one
array, at the rows that the low and the high nibbles of a block belong to, so that nothing is
interleaved. Edges of M and N need no mask: garbage there stays in rows and columns that are never
written back. The gradient by x contracts N: its last block is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import dispatch
from flora_jax.kernels.low_bit_matmul import blocks as sizes
from flora_jax.kernels.low_bit_matmul import tiles
from flora_jax.kernels.low_bit_matmul.blocks import Blocks
from flora_jax.kernels.low_bit_matmul.packing import LowBit, Rows
from flora_jax.kernels.manual_axes import results


def forward(
    x: jax.Array | Rows,
    w: LowBit,
    bias: jax.Array | None,
    *,
    activation: str | None,
    dtype: Any,
    placement: str | None = None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """``activation(x w + bias)``; see reference.py.

    ``placement``: default ``partial`` where a group is at least 128 rows, else ``weight`` (int8
    rows: always ``partial``).

    Raises:
      NotImplementedError: shapes that no block fits.
    """
    rows, x_scale = (x.values, x.scale) if isinstance(x, Rows) else (x, None)
    integer, most = rows.dtype == jnp.int8, None
    if isinstance(x, Rows) and x.zero is not None:
        # Differences have 9 bits: bfloat16 holds them, and float32 the sum of 256 products.
        rows, most = rows.astype(jnp.bfloat16) - x.zero.astype(jnp.bfloat16), 256
    blocks = _blocks(rows.shape[0], w, rows.dtype, dtype, blocks, most)
    if placement is None:
        placement = "weight" if w.group < 128 and not integer else "partial"
    (m, k), n, count = rows.shape, w.shape[-1], sizes.parts(w)
    steps = k // count // blocks.k
    at = [_rows_of(w, blocks, part) for part in range(count)]
    shape = lambda i, j, s: (i, j)
    inputs = {
        "x": [rows] * count,
        "values": w.values,
        **_group_inputs(w, blocks, count),
    }
    specs = {
        "x": [pl.BlockSpec((blocks.m, blocks.k), lambda i, j, s, f=f: (i, f(s))) for f in at],
        "values": pl.BlockSpec((blocks.k, blocks.n), lambda i, j, s: (s, j)),
        **_group_specs(w, blocks, at, lambda i, j, s: (s, j)),
    }
    if x_scale is not None:
        inputs["x_scale"] = x_scale
        specs["x_scale"] = pl.BlockSpec((blocks.m, 1), lambda i, j, s: (i, 0))
    if bias is not None:
        inputs["bias"] = bias.astype(jnp.float32)[None]
        specs["bias"] = pl.BlockSpec((1, blocks.n), lambda i, j, s: (0, j))
    call = pl.pallas_call(
        functools.partial(_forward_body, placement, activation, dtype, steps),
        grid=(pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), steps),
        in_specs=[specs],
        out_specs=pl.BlockSpec((blocks.m, blocks.n), shape),
        out_shape=results(jax.ShapeDtypeStruct((m, n), dtype), inputs),
        scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(rows, w, m * n * jnp.dtype(dtype).itemsize),
        interpret=dispatch.interpret_mode(),
        name="low_bit_matmul",
    )
    return call(inputs)


def _forward_body(placement, activation, dtype, steps, refs, out_ref, total_ref) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total_ref[...] = jnp.zeros_like(total_ref)

    total = total_ref[...]
    for part, codes in enumerate(_codes(refs)):
        x, scale, zero = refs["x"][part][...], refs["scale"][part][...], _zero(refs, part)
        total = total + tiles.product(x, codes, scale, zero, placement=placement)
    total_ref[...] = total

    @pl.when(step == steps - 1)
    def _finish():
        given = {name: refs[name][...] if name in refs else None for name in ("x_scale", "bias")}
        out_ref[...] = tiles.finish(total_ref[...], *given.values(), activation, dtype)


def dx(dy: jax.Array, w: LowBit, *, dtype: Any, blocks: Blocks | None = None) -> jax.Array:
    """``dy w^T`` with w rounded to dy's dtype, ``[M, K]``.

    The results of low and high nibbles are two arrays in the kernel, joined after it.

    Raises:
      NotImplementedError: shapes that no block fits.
    """
    blocks = _blocks(dy.shape[0], w, dy.dtype, dtype, blocks)
    (m, n), k, count = dy.shape, w.shape[0], sizes.parts(w)
    at = [_rows_of(w, blocks, part) for part in range(count)]
    stored, steps = k // count, pl.cdiv(n, blocks.n)
    inputs = {"dy": dy, "values": w.values, **_group_inputs(w, blocks, count)}
    call = pl.pallas_call(
        functools.partial(_dx_body, dtype, n if n % blocks.n else None, steps),
        grid=(pl.cdiv(m, blocks.m), stored // blocks.k, steps),
        in_specs=[
            {
                "dy": pl.BlockSpec((blocks.m, blocks.n), lambda i, s, j: (i, j)),
                "values": pl.BlockSpec((blocks.k, blocks.n), lambda i, s, j: (s, j)),
                **_group_specs(w, blocks, at, lambda i, s, j: (s, j)),
            }
        ],
        out_specs=pl.BlockSpec((count, blocks.m, blocks.k), lambda i, s, j: (0, i, s)),
        out_shape=results(jax.ShapeDtypeStruct((count, m, stored), dtype), inputs),
        scratch_shapes=[pltpu.VMEM((count, blocks.m, blocks.k), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(dy, w, m * k * jnp.dtype(dtype).itemsize),
        interpret=dispatch.interpret_mode(),
        name="low_bit_matmul_dx",
    )
    out = call(inputs)
    if count == 1:
        return out[0]
    out = out.reshape(2, m, k // w.tile, w.tile // 2)
    return out.transpose(1, 2, 0, 3).reshape(m, k)


def _dx_body(dtype, columns, steps, refs, out_ref, total_ref) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total_ref[...] = jnp.zeros_like(total_ref)

    dy = refs["dy"][...]
    width = dy.shape[1]
    inside = lambda a: a
    if columns is not None:
        # Past the last column lies whatever memory held, NaN too: both factors must be cleared.
        # In float32: not every TPU selects narrower numbers.
        inside = lambda a: jnp.where(
            lax.broadcasted_iota(jnp.int32, a.shape, 1) < columns - step * width, a, 0
        )
    dy = inside(dy.astype(jnp.float32)).astype(dy.dtype)
    for part, codes in enumerate(_codes(refs)):
        w = tiles.weights(codes, refs["scale"][part][...], _zero(refs, part), jnp.float32)
        w = inside(w).astype(dy.dtype)
        total_ref[part] = total_ref[part] + tiles.dot(dy, w, transpose=True)

    @pl.when(step == steps - 1)
    def _finish():
        out_ref[...] = total_ref[...].astype(dtype)


def _codes(refs: Any) -> tuple[jax.Array, ...]:
    values = refs["values"][...]
    return tiles.nibbles(values) if len(refs["scale"]) == 2 else (values,)


def _zero(refs: Any, part: int) -> jax.Array | None:
    return refs["zero"][part][...] if "zero" in refs else None


def _blocks(
    m: int, w: LowBit, x: Any, out: Any, blocks: Blocks | None, most: int | None = None
) -> Blocks:
    if blocks is None:
        return sizes.choose(m, w, x, out, most)
    reason = sizes.refusal(w, blocks, most)
    if reason is not None:
        raise NotImplementedError(reason)
    return blocks


def _rows_of(w: LowBit, blocks: Blocks, part: int) -> Callable[[Any], Any]:
    """Step of stored rows -> block of rows of the weight, of the low or the high nibbles."""
    if sizes.parts(w) == 1:
        return lambda s: s
    per = sizes.span(w) // blocks.k
    return lambda s: lax.div(s, per) * (2 * per) + lax.rem(s, per) + part * per


def _group_inputs(w: LowBit, blocks: Blocks, count: int) -> dict[str, list[jax.Array]]:
    """Scales and zero points ``[steps, groups of a step, N]``: whole in the axis before the lanes,
    which a block of a few groups could not cut."""
    each = max(1, blocks.k // w.group)

    def arrange(a: jax.Array) -> list[jax.Array]:
        full = jnp.broadcast_to(a, (w.groups, w.shape[-1]))
        return [full.reshape(w.groups // each, each, -1)] * count

    out = {"scale": arrange(w.scale)}
    if w.zero is not None:
        out["zero"] = arrange(w.zero.astype(jnp.int32))
    return out


def _group_specs(w: LowBit, blocks: Blocks, at: list[Any], step: Any) -> dict[str, list[Any]]:
    each, share = max(1, blocks.k // w.group), max(1, w.group // blocks.k)

    def spec(rows: Callable[[Any], Any]) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Any, ...]:
            s, j = step(*grid)
            return lax.div(rows(s), share), 0, j

        return pl.BlockSpec((None, each, blocks.n), index)

    names = ("scale",) if w.zero is None else ("scale", "zero")
    return {name: [spec(rows) for rows in at] for name in names}


def _cost(x: jax.Array, w: LowBit, out_bytes: int) -> pl.CostEstimate:
    k, n = w.shape
    return pl.CostEstimate(
        flops=2 * x.shape[0] * k * n,
        bytes_accessed=x.size * x.dtype.itemsize + w.nbytes + out_bytes,
        transcendentals=0,
    )
