"""The specification, in plain jnp: dequantise everything, multiply, finish."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.low_bit_matmul import tiles
from flora_jax.kernels.low_bit_matmul.packing import LowBit, Rows


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
    """``activation(x w + bias)``, x ``[M, K]``, w ``[K, N]``, bias ``[N]``; all of w is formed.

    Float rows: float32 products and sums. int8 rows: the sum within a group is an exact integer.
    """
    bias = None if bias is None else bias[None]
    if not isinstance(x, Rows):
        y = tiles.dot(x.astype(jnp.float32), _wide(w, x.dtype, placement))
        return tiles.finish(y, None, bias, activation, dtype)
    if x.values.dtype == jnp.int8:
        y = integer(x, w)
    else:
        y = tiles.dot(x.values.astype(jnp.float32), _wide(w, x.values.dtype, placement))
    return tiles.finish(y, x.scale, bias, activation, dtype)


def _wide(w: LowBit, dtype: Any, placement: str | None) -> jax.Array:
    """float32, rounded to x's dtype before where the scales go on the weight."""
    return w.dense(dtype if placement == "weight" else jnp.float32).astype(jnp.float32)


def integer(x: Rows, w: LowBit) -> jax.Array:
    """``sum_g s_g (sum_k (q_x - z_x) (q_w - z_w))``: int32 within a group, float32 over groups."""
    m, n = x.shape[0], w.shape[-1]
    rows = x.values.astype(jnp.int32)
    if x.zero is not None:
        rows = rows - x.zero.astype(jnp.int32)
    codes = w.codes().astype(jnp.int32).reshape(w.groups, w.group, n)
    if w.zero is not None:
        codes = codes - w.zero.astype(jnp.int32)[:, None, :]
    parts = jnp.einsum("mgk,gkn->gmn", rows.reshape(m, w.groups, w.group), codes)
    y = jnp.zeros((m, n), jnp.float32)
    for part, scale in zip(parts, w.scale):
        y = y + part.astype(jnp.float32) * scale
    return y


def dx(dy: jax.Array, w: LowBit, *, dtype: Any, blocks: Any = None) -> jax.Array:
    """``dy w^T``, dy ``[M, N]``, to ``[M, K]``; float32 products and sums."""
    return tiles.dot(dy.astype(jnp.float32), w.dense(jnp.float32), transpose=True).astype(dtype)
