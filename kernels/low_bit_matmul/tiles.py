"""The arithmetic of one tile, the same for every backend; tested on its own.

No gather, no interleave: shifts, conversions and products of contiguous slices only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora_jax.core.errors import ConfigError, unknown

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": jax.nn.gelu}
PLACEMENTS = ("partial", "weight")
"""Where a group's scale goes: on the float32 product of its codes, or on the weight, which is then
rounded to the dtype of x."""


def nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 bytes to the signed low and high nibbles, int32."""
    wide = packed.astype(jnp.int32)
    return (wide << 28) >> 28, wide >> 4


def dot(x: jax.Array, w: jax.Array, *, transpose: bool = False) -> jax.Array:
    """``x @ w`` (``x @ w.T``): int32 of int8, else float32; exact products of float32."""
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    wide = jnp.int32 if integer else jnp.float32
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=wide)


def product(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    placement: str = "partial",
) -> jax.Array:
    """``x [m, k]`` with codes ``[k, n]`` of the groups that the rows of ``scale [G, n]`` give.

    Returns:
      ``[m, n]`` float32. ``partial``: sum over groups of ``s_g (x_g (q_g - z_g))``, the inner
      product of x with integers that x's dtype holds exactly; int8 x: exact int32. ``weight``:
      ``x w`` with ``w = (q - z) s`` rounded to x's dtype.
    """
    if placement == "weight":
        return dot(x, weights(codes, scale, zero, x.dtype))
    groups = scale.shape[0]
    size = codes.shape[0] // groups
    total = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        offset = None if zero is None else zero[g : g + 1]
        y = group_product(x[:, part], codes[part], offset) * scale[g : g + 1]
        total = y if total is None else total + y
    return total


def group_product(x: jax.Array, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
    """``x (q - z)`` of one group, float32; ``zero [1, n]``."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        if zero is not None:
            codes = codes.astype(jnp.int32) - zero.astype(jnp.int32)
        return dot(x, as_float(codes, x.dtype))
    y = dot(x, codes.astype(jnp.int8))
    if zero is not None:
        # Whole numbers below 2^24: exact, and TPUs sum no integers over lanes.
        total = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        y = y - total.astype(jnp.int32) * zero.astype(jnp.int32)
    return y.astype(jnp.float32)


def weights(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, dtype: Any) -> jax.Array:
    """``(q - z) s``, computed in float32, rounded to ``dtype``."""
    (k, n), groups = codes.shape, scale.shape[0]
    wide = codes.astype(jnp.float32)
    if groups == 1:
        wide = wide if zero is None else wide - zero.astype(jnp.float32)
        return (wide * scale).astype(dtype)
    wide = wide.reshape(groups, k // groups, n)
    if zero is not None:
        wide = wide - zero.astype(jnp.float32)[:, None, :]
    return (wide * scale[:, None, :]).reshape(k, n).astype(dtype)


def as_float(codes: jax.Array, dtype: Any) -> jax.Array:
    """Codes in the dtype of x, through float32: narrower conversions do not exist everywhere."""
    return codes.astype(jnp.float32).astype(dtype)


def finish(
    y: jax.Array,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    dtype: Any,
) -> jax.Array:
    """``activation(y x_scale + bias)`` in ``dtype``; x_scale ``[m, 1]``, bias ``[1, n]``."""
    if x_scale is not None:
        y = y * x_scale
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = activate(y, activation)
    return y.astype(dtype)


def activate(y: jax.Array, name: str) -> jax.Array:
    if name not in ACTIVATIONS:
        raise ConfigError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name](y)


# Tiles of the transposed product: a row of codes belongs to a column of the weight or, in the
# gradient by x, to a row of it; ``axis`` is the one that a vector of scales or zero points runs
# along.


UNITS = (1.0, 0.0625)
"""What the numbers of :func:`halves` count."""


def halves(packed: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """int8 bytes to the codes of the low nibbles and 16 times those of the high, in floats.

    A Hopper GPU's compiler has no 8-bit arithmetic but bits.
    """
    low = (packed & jnp.int8(15)) ^ jnp.int8(8)
    return low.astype(dtype) - jnp.array(8, dtype), (packed & jnp.int8(-16)).astype(dtype)


def eight_bits(stored: jax.Array, format: str, dtype: Any) -> list[tuple[jax.Array, float]]:
    """Stored bytes, widened to int16, to 8-bit numbers and what they count, a pair per part.

    int4: multiples of 16 in int8, all the upper bits; exact in float8, too.
    """
    stored, bits = stored.astype(jnp.int16), jnp.int16
    if format != "int4":
        codes = stored.astype(jnp.int8)
        return [(codes if dtype == jnp.int8 else lax.bitcast_convert_type(codes, dtype), 1.0)]
    if dtype == jnp.int8:
        parts = stored << bits(4), stored & bits(-16)
        return [(part.astype(jnp.int8), 1 / 16) for part in parts]
    low, high = (stored & bits(15)) ^ bits(8), (stored & bits(240)) ^ bits(128)
    shifted = low.astype(jnp.float32) - 8.0, high.astype(jnp.float32) - 128.0
    return [(part.astype(dtype), unit) for part, unit in zip(shifted, UNITS)]


def along(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, (axis,))


def centred(codes: jax.Array, zero: jax.Array | None, unit: float, axis: int) -> jax.Array:
    """``codes - zero / unit``: exact, 8 bits hold the difference of two codes."""
    if zero is None:
        return codes
    zero = (zero.astype(jnp.float32) * (1 / unit)).astype(codes.dtype)
    return codes - along(zero, codes.shape, axis)


def rescaled(codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """``codes scale``, computed in float32, rounded to the dtype of codes."""
    wide = codes.astype(jnp.float32)
    return (wide * along(scale, wide.shape, axis)).astype(codes.dtype)


def whole_group(y: jax.Array, before: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(a group's sum of integers, or zeros before its last step; what the next step adds to)``.

    ``y``: of a step, float32 integers below 2^24; ``before``: int32.
    """
    total, done = before + y.astype(jnp.int32), last.astype(jnp.int32)
    return (total * done).astype(jnp.float32), total * (1 - done)
