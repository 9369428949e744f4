"""Local terms of image attention: tokens as a grid, and depth-wise windows over it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError


def patches(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The last ``h * w`` of ``[B, T, ...]`` as ``[B, h, w, C]``: a class token before them is left.

    Raises:
      ConfigError: there are fewer tokens.
    """
    height, width = grid
    if x.shape[1] < height * width:
        raise ConfigError(f"{x.shape[1]} tokens do not fill a grid of {height}x{width}")
    return x[:, x.shape[1] - height * width :].reshape(x.shape[0], height, width, -1)


def add_patches(out: jax.Array, local: jax.Array) -> jax.Array:
    """``out [B, T, N, H]`` with ``[B, h, w, N * H]`` added to the tokens of :func:`patches`."""
    count = local.shape[1] * local.shape[2]
    local = local.reshape(out.shape[0], count, *out.shape[2:])
    return out + jnp.pad(local, ((0, 0), (out.shape[1] - count, 0), (0, 0), (0, 0)))


def window_sums(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A depth-wise convolution with a kernel for each example, zeros outside the grid.

    ``y[b, i, j, c] = sum_{r, s} kernel[b, r, s, c] x[b, i + r - R, j + s - S, c]``

    Args:
      x: ``[B, h, w, C]``.
      kernel: ``[B, 2R + 1, 2S + 1, C]``.

    >>> window_sums(jnp.ones((1, 2, 2, 1)), jnp.ones((1, 3, 3, 1)))[0, 0, 0]
    Array([4.], dtype=float32)
    """
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[1:3]
    x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    shifted = lambda r, s: x[:, r : r + height, s : s + width] * kernel[:, r, s, None, None]
    return sum(shifted(r, s) for r in range(rows) for s in range(columns))


def draw_conv(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> dict[str, jax.Array]:
    """A convolution ``[*window, inputs, C]`` started as in torch: uniform, ``+-fan_in ** -0.5``."""
    first, second = jax.random.split(key)
    edge = math.prod(shape[:-1]) ** -0.5
    kernel = jax.random.uniform(first, shape, dtype, -edge, edge)
    return {"kernel": kernel, "bias": jax.random.uniform(second, shape[-1:], dtype, -edge, edge)}
