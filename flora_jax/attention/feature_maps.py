"""Feature maps of linear attention: ``phi: R^D -> R^F``, in float32.

``weight(i, j) = phi(q_i) . phi(k_j)`` stands for ``exp(q_i . k_j / sqrt(D))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLAMP = 1e-12


class FeatureMap(NamedTuple):
    """``of(x [..., D], role)`` with role ``q`` or ``k``, and its F for a D."""

    of: Callable[[jax.Array, str], jax.Array]
    size: Callable[[int], int]


def _same(dim: int) -> int:
    return dim


def elu1(x: jax.Array, role: str) -> jax.Array:
    """``elu(x) + 1`` (Katharopoulos et al. 2020, arXiv 2006.16236): positive, F = D."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def relu(x: jax.Array, role: str) -> jax.Array:
    """``max(x, 0)``: blind to the length of q, F = D."""
    return jnp.maximum(x, 0)


def softmax(x: jax.Array, role: str) -> jax.Array:
    """Softmax over the channels, so that ``phi(q) . phi(k)`` lies in (0, 1]."""
    return jax.nn.softmax(x, axis=-1)


def exp(x: jax.Array, role: str) -> jax.Array:
    """``exp(x)``; a query may lose its largest entry, which its own normaliser restores.

    Keys may not: a constant for each key would weigh them differently.
    """
    return jnp.exp(x - x.max(axis=-1, keepdims=True)) if role == "q" else jnp.exp(x)


def taylor(x: jax.Array, scale: float) -> jax.Array:
    """``phi(q) . phi(k) = 1 + s + s^2 / 2`` with ``s = scale q . k``, always positive.

    ``[1, x, x_i x_i / sqrt 2, x_i x_j (i < j)]`` of x times sqrt(scale): the products of a pair
    are kept once, F = 1 + D + D (D + 1) / 2.
    """
    x = x * math.sqrt(scale)
    rows, columns = jnp.triu_indices(x.shape[-1])
    pairs = x[..., rows] * x[..., columns] * jnp.where(rows == columns, math.sqrt(0.5), 1.0)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


def dpfp(x: jax.Array, nu: int) -> jax.Array:
    """``concat_j r * roll(r, j), r = [relu x, relu -x]`` for j = 1..nu (arXiv 2102.11174).

    F = 2 D nu. (A known port builds ``[relu x, -relu x]``; this is the paper's form.)
    """
    r = jnp.maximum(jnp.concatenate([x, -x], axis=-1), 0)
    return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)], axis=-1)


def _taylor_size(dim: int) -> int:
    return 1 + dim + dim * (dim + 1) // 2


PLAIN = {
    "elu1": FeatureMap(elu1, _same),
    "relu": FeatureMap(relu, _same),
    "softmax": FeatureMap(softmax, _same),
    "exp": FeatureMap(exp, _same),
    "taylor2": FeatureMap(lambda x, role: taylor(x, x.shape[-1] ** -0.5), _taylor_size),
    # Hedgehog's untrained reference has no 1 / sqrt(D).
    "taylor2_unscaled": FeatureMap(lambda x, role: taylor(x, 1.0), _taylor_size),
    "dpfp1": FeatureMap(lambda x, role: dpfp(x, 1), lambda d: 2 * d),
    "dpfp2": FeatureMap(lambda x, role: dpfp(x, 2), lambda d: 4 * d),
    "dpfp3": FeatureMap(lambda x, role: dpfp(x, 3), lambda d: 6 * d),
}
"""Maps without parameters (Based, arXiv 2402.18668, for ``taylor2``)."""


def mirrored_exp(x: jax.Array) -> jax.Array:
    """``[exp x, exp -x]``, the paper's; float32 overflows past 88."""
    return jnp.exp(jnp.concatenate([x, -x], axis=-1))


def mirrored_softmax(x: jax.Array) -> jax.Array:
    """``[softmax x, softmax -x]``, each half on its own."""
    both = jnp.concatenate([jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)], axis=-1)
    return jnp.maximum(both, CLAMP)


def mirrored_exp_shifted(x: jax.Array) -> jax.Array:
    """``[exp(x - max x), exp(-x + min x)]``: no overflow, at a constant for each token."""
    high, low = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
    return jnp.maximum(jnp.exp(jnp.concatenate([x - high, low - x], axis=-1)), CLAMP)


def mirrored_joint(x: jax.Array) -> jax.Array:
    """One softmax over ``[2 x, -2 x]``."""
    return jax.nn.softmax(jnp.concatenate([2 * x, -2 * x], axis=-1), axis=-1)


HEDGEHOG = {
    "exp": mirrored_exp,
    "softmax": mirrored_softmax,
    "exp_shifted": mirrored_exp_shifted,
    "joint": mirrored_joint,
}
"""Last step of Hedgehog's maps, ``[..., F'] -> [..., 2 F']``: ``exp`` the paper's, ``softmax`` the
stable form (also LoLCATs' ``softmax_dim``), ``exp_shifted`` LoLCATs' ``exp_dim``, ``joint`` that of
flash-linear-attention."""
