"""Blocked XLA form: a block of columns (of rows, backward) is dequantised at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora_jax.kernels import costs
from flora_jax.kernels.low_bit_matmul import tiles
from flora_jax.kernels.low_bit_matmul.packing import (
    LowBit,
    Rows,
    row_unit,
    take_columns,
    take_rows,
)
from flora_jax.kernels.manual_axes import like

BLOCK, GPU_BLOCK = 1 << 22, 1 << 28
"""Weights dequantised at a time, at most: 8 MB in bfloat16; on a GPU, where each turn of a loop
starts kernels that wait for one another and a block of few columns leaves it idle, 512 MB."""


def divisor(total: int, at_most: int, unit: int = 1) -> int:
    """The largest multiple of ``unit`` that divides ``total`` and is at most ``at_most``.

    ``unit`` divides ``total``; never less than ``unit``. ``total`` itself when its divisors are so
    few that the blocks would be tiny.

    >>> divisor(14336, 1000, 128), divisor(97, 50)
    (896, 97)
    """
    count = total // unit
    fits = [d for d in range(1, count + 1) if count % d == 0 and d * unit <= at_most]
    best = max(fits, default=1) * unit
    return best if 8 * best >= min(at_most, total) or total <= at_most else total


def block() -> int:
    """Weights dequantised at a time, at most, where this is traced for."""
    return GPU_BLOCK if costs.xla_machine() is costs.GPU else BLOCK


def forward(
    x: jax.Array | Rows,
    w: LowBit,
    bias: jax.Array | None,
    *,
    activation: str | None,
    dtype: Any,
    placement: str | None = None,
    blocks: Any = None,
) -> jax.Array:
    """``activation(x w + bias)``; see reference.py.

    ``placement``: default ``partial`` where a column has one scale, else ``weight``; int8 rows are
    always ``partial``.
    """
    (k, n), m = w.shape, x.shape[0]
    size = divisor(n, max(1, block() // k))

    def columns(w: LowBit, bias: jax.Array | None) -> jax.Array:
        y, scale = _product(x, w, placement)
        return tiles.finish(y, scale, None if bias is None else bias[None], activation, dtype)

    if size == n:
        return columns(w, bias)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        part = None if bias is None else lax.dynamic_slice_in_dim(bias, i * size, size)
        y = columns(take_columns(w, i * size, size), part)
        return lax.dynamic_update_slice(out, y, (0, i * size))

    return lax.fori_loop(0, n // size, step, like(jnp.zeros((m, n), dtype), x, w))


def _product(
    x: jax.Array | Rows, w: LowBit, placement: str | None
) -> tuple[jax.Array, jax.Array | None]:
    """The float32 product and the scale of the rows."""
    if not isinstance(x, Rows):
        return _floats(x, w, placement), None
    if x.values.dtype != jnp.int8:
        return _floats(x.values, w, placement), x.scale
    return _integers(x, w), x.scale


def _floats(x: jax.Array, w: LowBit, placement: str | None) -> jax.Array:
    codes = w.codes()
    eight = x.dtype == jnp.float8_e4m3fn
    if placement is None:
        placement = "partial" if w.groups == 1 or eight else "weight"
    if placement == "weight" or w.groups == 1:
        return tiles.product(x, codes, w.scale, w.zero, placement=placement)
    return _over_groups(x, codes, w, tiles.group_product)


def _over_groups(x: jax.Array, codes: jax.Array, w: LowBit, inner: Any) -> jax.Array:
    """Sum over groups of ``inner(x_g, q_g, z_g) s_g``, one group at a time."""

    def step(total: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
        size = w.group
        part = lax.dynamic_slice_in_dim(codes, g * size, size)
        zero = None if w.zero is None else lax.dynamic_slice_in_dim(w.zero, g, 1)
        scale = lax.dynamic_slice_in_dim(w.scale, g, 1)
        y = inner(lax.dynamic_slice_in_dim(x, g * size, size, 1), part, zero)
        return total + y * scale, None

    start = like(jnp.zeros((x.shape[0], codes.shape[1]), jnp.float32), x, w)
    return lax.scan(step, start, jnp.arange(w.groups))[0]


def _integers(x: Rows, w: LowBit) -> jax.Array:
    def inner(rows: jax.Array, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        if x.zero is None:
            return tiles.group_product(rows, codes, zero)
        y = tiles.dot(rows, codes)
        columns = jnp.sum(codes.astype(jnp.int32), axis=0, keepdims=True)
        if zero is not None:
            wide = zero.astype(jnp.int32)
            y = y - jnp.sum(rows.astype(jnp.int32), axis=1, keepdims=True) * wide
            columns = columns - w.group * wide
        return (y - x.zero.astype(jnp.int32) * columns).astype(jnp.float32)

    return _over_groups(x.values, w.codes(), w, inner)


def dx(dy: jax.Array, w: LowBit, *, dtype: Any, blocks: Any = None) -> jax.Array:
    """``dy w^T`` with w rounded to dy's dtype, a block of rows at a time."""
    (k, n), m = w.shape, dy.shape[0]
    size = divisor(k, max(1, block() // n), row_unit(w))

    def rows(w: LowBit) -> jax.Array:
        wide = tiles.weights(w.codes(), w.scale, w.zero, dy.dtype)
        return tiles.dot(dy, wide, transpose=True).astype(dtype)

    if size == k:
        return rows(w)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(out, rows(take_rows(w, i * size, size)), (0, i * size))

    return lax.fori_loop(0, k // size, step, like(jnp.zeros((m, k), dtype), dy, w))


def dscale(x: jax.Array, dy: jax.Array, w: LowBit) -> jax.Array:
    """Gradient of the scales ``[G, N]``: ``sum_m dy[m, n] (x_g (q_g - z_g))[m, n]``.

    One group at a time; the gradient of the weight itself is never formed.
    """
    codes = w.codes()

    def one(g: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(codes, g * w.group, w.group)
        zero = None if w.zero is None else lax.dynamic_slice_in_dim(w.zero, g, 1)
        y = tiles.group_product(lax.dynamic_slice_in_dim(x, g * w.group, w.group, 1), part, zero)
        return jnp.sum(y * dy.astype(jnp.float32), axis=0)

    full = lax.map(one, jnp.arange(w.groups))
    return full if w.scale.shape[-1] == full.shape[-1] else full.sum(-1, keepdims=True)
