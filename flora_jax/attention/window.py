"""What variants with a window of the last keys share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flora_jax.attention.cache import ring_positions
from flora_jax.kernels.window_attention.reference import MASKED as MASKED
from flora_jax.kernels.window_attention.xla import BLOCK as BLOCK


def in_order(ring: dict[str, jax.Array], start: jax.Array) -> tuple[jax.Array, ...]:
    """The keys and values of a ring by position, and which are there.

    Args:
      start: ``[B, 1]``, the position of each row's next token.

    Returns:
      ``k, v [B, W, K, H]`` and ``there [B, W]`` of positions ``start - W .. start - 1``.
    """
    slots = ring["k"].shape[1]
    at = (start + jnp.arange(slots)) % slots
    take = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
    there = jnp.take_along_axis(ring_positions(start, slots), at, axis=1) >= 0
    return take(ring["k"]), take(ring["v"]), there
