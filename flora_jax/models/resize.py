"""Cubic resize of a position grid as two small matrices, equal to torch's bicubic.

Torch (and ONNX by default) use the Keys cubic with ``a = -0.75``; ``jax.image.resize`` uses
``a = -0.5``, which is close to but not what vision transformers were trained and exported with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cubic_weights(offset: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The Keys kernel at distance ``|offset|`` (1981): 1 at 0, 0 at 1 and beyond 2.

    >>> cubic_weights(np.asarray([0.0, 0.5, 1.0, 1.5, 2.0])).tolist()
    [1.0, 0.59375, 0.0, -0.09375, 0.0]
    """
    d = np.abs(offset)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def cubic_matrix(source: int, target: int, a: float = -0.75) -> np.ndarray:
    """``[target, source]``: rows resample a line of ``source`` points at ``target`` pixel centres.

    Pixel centres are aligned (``align_corners=False``), edges are repeated, nothing is smoothed on
    the way down: ``torch.nn.functional.interpolate(mode="bicubic", size=target)``.

    >>> cubic_matrix(3, 3).tolist() == np.eye(3).tolist()
    True
    """
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, source - 1)
        np.add.at(matrix, (np.arange(target), column), cubic_weights(centre - (first + tap), a))
    return matrix


def resize_grid(grid: jax.Array, height: int, width: int) -> jax.Array:
    """``[h,w,D] -> [height,width,D]`` by the cubic above, in float32; the same size is exact.

    >>> resize_grid(jnp.ones((4, 4, 2)), 6, 3).shape
    (6, 3, 2)
    """
    if grid.shape[:2] == (height, width):
        return grid
    rows = jnp.asarray(cubic_matrix(grid.shape[0], height), jnp.float32)
    columns = jnp.asarray(cubic_matrix(grid.shape[1], width), jnp.float32)
    wide = grid.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    out = jnp.einsum("Hh,Ww,hwd->HWd", rows, columns, wide, precision=exact)
    return out.astype(grid.dtype)
