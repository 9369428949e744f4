"""Initial values that several methods share, in our ``[in, out]`` orientation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype=jnp.float32):
    """torch ``kaiming_uniform_(a=sqrt(5))``: ``U(-b, b)``, ``b = 1 / sqrt(fan_in)``."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], fans: int, dtype=jnp.float32):
    """``U(-b, b)``, ``b = sqrt(6 / (fan_in + fan_out))``; ``fans`` is the sum."""
    bound = math.sqrt(6.0 / fans)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
