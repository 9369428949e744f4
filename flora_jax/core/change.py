"""The low-rank factors of what an adapter changes, found from its expression."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from flora_jax.core.lowrank import Factors, before, plus, side_by_side
from flora_jax.core.operators import Base, Compose, LinearMap, Sum


def delta_factors(expression: LinearMap, base: Base) -> Factors | None:
    """``a, b`` with ``expression = base + a b`` exactly, or None where that is not low-rank.

    Sums that hold the base once, and products ``(I + a1 b1) (base + a b) (I + a2 b2)``: all that
    the maps themselves tell, found without forming the change. The base is multiplied with tall
    matrices only.
    """
    if expression is base:
        *batch, n_in, n_out = base.spec.canonical_shape(tuple(base.weight.shape))
        return jnp.zeros((*batch, n_in, 0)), jnp.zeros((*batch, 0, n_out))
    if isinstance(expression, Sum):
        changes = [delta_factors(term, base) for term in expression.terms]
        for n, change in enumerate(changes):
            if change is not None:
                others = (*expression.terms[:n], *expression.terms[n + 1 :])
                return side_by_side([change, *(other.factors() for other in others)])
    if isinstance(expression, Compose):
        for n, stage in enumerate(expression.stages):
            change = delta_factors(stage, base)
            if change is not None:
                return _sandwich(expression.stages[:n], base, change, expression.stages[n + 1 :])
    return None


def _sandwich(
    left: Sequence[LinearMap], base: Base, change: Factors, right: Sequence[LinearMap]
) -> Factors | None:
    """``L (W + a b) R - W = (L - I) W R + L a b R + W (R - I)``."""
    near_left = Compose(*left).identity_factors() if left else None
    near_right = Compose(*right).identity_factors() if right else None
    if (left and near_left is None) or (right and near_right is None):
        return None
    after = Compose(*right)
    a, b = change
    parts = [(plus(near_left, a) if left else a, after.then(b))]
    if left:
        parts.append((near_left[0], after.then(base.then(near_left[1]))))
    if right:
        parts.append((before(base, near_right[0]), near_right[1]))
    return side_by_side(parts)
