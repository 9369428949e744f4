"""Ranks by rule from the spectrum of a weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core import paths
from flora_jax.core.errors import PlanError
from flora_jax.core.initialize import over_stack
from flora_jax.core.leaf import WeightLeaf, dense, is_leaf
from flora_jax.core.plan import Plan, make_entry


def energy_rank(values: np.ndarray, energy: float) -> int:
    """The smallest r with ``sum_{k<=r} s_k^2 >= energy * sum s_k^2``; at least 1.

    >>> energy_rank(np.array([3.0, 1.0, 0.1]), 0.9)
    2
    """
    if not 0.0 < energy <= 1.0:
        raise PlanError(f"energy={energy} is outside (0, 1]")
    squares = np.square(np.asarray(values, np.float64))
    kept = np.cumsum(squares)
    # Rounding must not ask for more than all of it.
    return min(int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1, len(squares))


def elbow_rank(values: np.ndarray) -> int:
    """The number of values before the sharpest bend: the largest ``s_{k-1} - 2 s_k + s_{k+1}``.

    All of them when there are fewer than three.

    >>> elbow_rank(np.array([10.0, 9.0, 8.0, 1.0, 0.9, 0.8]))
    3
    """
    values = np.asarray(values, np.float64)
    return len(values) if len(values) < 3 else 1 + int(np.argmax(np.diff(values, 2)))


def spectral_ranks(
    plan: Plan,
    params: Any,
    *,
    energy: float = 0.99,
    elbow: bool = False,
    max_rank: int | None = None,
) -> Plan:
    """The plan with ranks read from the weights, for methods that start from their spectrum.

    The rank of a plan's entry is static, so it is chosen here, before ``init``. It is the smallest
    that keeps a share of the squared spectrum (singular values; Kronecker-singular values for
    SoKA), or the elbow if that is smaller; the layers of a stack share the largest of their ranks.

    Args:
      plan: of ``SVFit``, ``PiSSA`` and ``SoKA`` (other entries stay as they are).
      params: the base, with values.
      energy: share of ``sum s_k^2`` to keep.
      elbow: also find the bend of each spectrum and take the smaller rank.
      max_rank: upper bound.

    Raises:
      PlanError: no entry has a method that reads the spectrum.

    >>> import flora_jax as flora
    >>> params = {"kernel": np.diag([3.0, 1.0, 0.1])}
    >>> plan = flora.plan(params, {"kernel": flora.SVFit()})
    >>> spectral_ranks(plan, params, energy=0.9)["kernel"].adapter.rank
    2
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    entries, found = [], False
    for entry in plan:
        spectrum, n = getattr(entry.adapter, "spectrum", None), len(entry.stack)
        if spectrum is None:
            entries.append(entry)
            continue
        found, leaf, spec = True, leaves[entry.path], entry.spec.unstacked()
        weight = over_stack(dense, n)(leaf) if isinstance(leaf, WeightLeaf) else leaf
        of_one = over_stack(lambda w: spectrum(spec, w), n)  # noqa: B023
        values = np.asarray(jax.jit(of_one)(jnp.asarray(weight, jnp.float32)))
        rows = values.reshape(-1, values.shape[-1])
        ranks = [energy_rank(row, energy) for row in rows]
        if elbow:
            ranks = [min(rank, elbow_rank(row)) for rank, row in zip(ranks, rows)]
        rank = min(max(ranks), max_rank or max(ranks))
        adapter = dataclasses.replace(entry.adapter, rank=rank)
        entries.append(make_entry(entry.path, adapter, entry.spec, entry.shape, entry.dtype))
    if not found:
        raise PlanError("no weight of the plan has a method that reads the spectrum (SVFit, SoKA)")
    return Plan(tuple(entries))
