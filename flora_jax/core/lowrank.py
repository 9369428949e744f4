"""Arithmetic on pairs of factors ``a [.., in, r]``, ``b [.., r, out]`` that stand for ``a b``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]


def transpose(m: jax.Array) -> jax.Array:
    """``[..., in, out] -> [..., out, in]``."""
    return jnp.swapaxes(m, -1, -2)


def before(stage: Any, a: jax.Array) -> jax.Array:
    """``stage.dense() @ a`` for a tall matrix ``a [.., n, r]``, without forming the stage."""
    return transpose(stage.T.then(transpose(a)))


def around(left: Sequence[Any], pair: Factors, right: Sequence[Any]) -> Factors:
    """Factors of ``L a b R`` for the stages of L and R."""
    a, b = pair
    for stage in reversed(left):
        a = before(stage, a)
    for stage in right:
        b = stage.then(b)
    return a, b


def plus(near: Factors, a: jax.Array) -> jax.Array:
    """``(I + near) a``."""
    return a + jnp.matmul(near[0], jnp.matmul(near[1], a))


def side_by_side(parts: Sequence[Factors | None]) -> Factors | None:
    """Factors of a sum from those of its terms: a's beside, b's below each other."""
    if not parts or any(part is None for part in parts):
        return None
    batch = max((part[0].shape[:-2] for part in parts), key=len)
    wide = lambda x: jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    a = jnp.concatenate([wide(part[0]) for part in parts], axis=-1)
    return a, jnp.concatenate([wide(part[1]) for part in parts], axis=-2)
