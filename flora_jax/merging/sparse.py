"""TIES, DARE and magnitude pruning of task vectors (differences from a common base).

A set of tasks is a sequence of ``{path: array}``; a path may be missing from some, which then have
no say at that path. Each leaf is merged for itself, layer by layer where its first ``stacks[path]``
axes are those of a scanned stack, so that scanned and unrolled models agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.initialize import over_stack, path_keys

Tasks = Sequence[Mapping[str, jax.Array]]
ELECTIONS = ("total", "frequency")


def trim(x: jax.Array, density: float) -> jax.Array:
    """The ``int(density * size)`` entries of largest magnitude, the rest 0.

    Among equal magnitudes at the cut the earlier entries stay, so the count is exact.

    >>> trim(jnp.array([3.0, -1.0, 2.0, 0.5]), 0.5).tolist()
    [3.0, 0.0, 2.0, 0.0]
    """
    keep = _count(x.size, density)
    if keep == x.size:
        return x
    order = jnp.argsort(-jnp.abs(x.reshape(-1)), stable=True)
    mask = jnp.zeros(x.size, bool).at[order[:keep]].set(True)
    return jnp.where(mask.reshape(x.shape), x, jnp.zeros_like(x))


def _count(size: int, density: float) -> int:
    if not 0.0 <= density <= 1.0:
        raise ConfigError(f"density={density} is outside [0, 1]")
    return int(density * size)


def drop(key: jax.Array, x: jax.Array, density: float) -> jax.Array:
    """DARE: each entry stays with probability ``density`` and is then divided by it.

    Args:
      density: ``1 - p`` of the paper's drop rate p.
    """
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density={density} of a random drop is outside (0, 1]")
    keep = jax.random.bernoulli(key, density, x.shape)
    return jnp.where(keep, x / density, jnp.zeros_like(x))


def elect_sign(stacked: jax.Array, election: str = "total") -> jax.Array:
    """The sign ``+-1`` that each entry of ``[n, ...]`` tasks agrees on.

    ``total``: of the sum (the larger mass wins, the paper's rule); ``frequency``: of the larger
    number of tasks. A tie is +1.
    """
    if election not in ELECTIONS:
        raise ConfigError(unknown("election", election, ELECTIONS))
    votes = stacked if election == "total" else jnp.sign(stacked)
    return jnp.where(votes.sum(0) >= 0, 1.0, -1.0).astype(stacked.dtype)


def disjoint_mean(stacked: jax.Array, sign: jax.Array, weights: jax.Array) -> jax.Array:
    """``sum_i w_i x_i / count`` over the tasks whose entry has the elected sign; 0 where none."""
    agree = jnp.sign(stacked) == sign
    total = jnp.where(agree, stacked * _spread(weights, stacked), 0.0).sum(0)
    return total / jnp.maximum(agree.sum(0), 1)


def _spread(weights: jax.Array, stacked: jax.Array) -> jax.Array:
    return jnp.asarray(weights, stacked.dtype).reshape(-1, *(1,) * (stacked.ndim - 1))


def _merged(
    tasks: Tasks,
    weights: Sequence[Any] | None,
    stacks: Mapping[str, int],
    prepare: Callable[[jax.Array, jax.Array], jax.Array],
    join: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """``prepare(key, x)`` each task's leaf, then ``join([n, ...], [n])``; float32 inside."""
    weights = [1.0] * len(tasks) if weights is None else list(weights)
    if len(weights) != len(tasks):
        raise ConfigError(f"{len(weights)} weights for {len(tasks)} tasks")
    key = jax.random.key(0) if key is None else key
    out = {}
    for path in dict.fromkeys(path for task in tasks for path in task):
        has = [n for n, task in enumerate(tasks) if path in task]
        leaves = [jnp.asarray(tasks[n][path]) for n in has]
        depth = stacks.get(path, 0)
        lead = leaves[0].shape[:depth]
        keys = [path_keys(jax.random.fold_in(key, n), path, lead) for n in has]

        def one(keys, xs, ws):
            wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in xs]
            return join(jnp.stack([prepare(k, x) for k, x in zip(keys, wide)]), ws)

        ws = jnp.broadcast_to(
            jnp.asarray([weights[n] for n in has], jnp.float32), (*lead, len(has))
        )
        merged = jax.jit(over_stack(one, depth))(keys, leaves, ws)
        out[path] = merged.astype(leaves[0].dtype)
    return out


def linear(
    tasks: Tasks, weights: Sequence[Any] | None = None, *, stacks: Mapping[str, int] = {}
) -> dict[str, jax.Array]:
    """Task arithmetic: ``sum_i w_i x_i``. Source: arXiv 2212.04089."""
    return _merged(tasks, weights, stacks, lambda k, x: x, lambda xs, ws: _sum(xs, ws))


def _sum(stacked: jax.Array, weights: jax.Array) -> jax.Array:
    return (stacked * _spread(weights, stacked)).sum(0)


def magnitude_prune(
    tasks: Tasks,
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    stacks: Mapping[str, int] = {},
) -> dict[str, jax.Array]:
    """``sum_i w_i trim(x_i)``: the largest entries of each task, added."""
    return _merged(tasks, weights, stacks, lambda k, x: trim(x, density), _sum)


def ties(
    tasks: Tasks,
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    election: str = "total",
    stacks: Mapping[str, int] = {},
) -> dict[str, jax.Array]:
    """TIES: trim each task, elect a sign for each entry, average the tasks that agree with it.

    ``out = sum_{i: sign x_i = s} w_i x_i / #{i: sign x_i = s}`` with ``x_i`` trimmed to ``density``
    and ``s`` elected by the unweighted trimmed tasks.

    Args:
      density: share of entries that stay, per leaf (the paper's top-k %, there of the whole model).
      election: ``total`` (mass, the paper's) or ``frequency``.

    Source: arXiv 2306.01708; the place of the weights (after the election, which the paper does not
    have) as in HF PEFT ``utils/merge_utils.py``.
    """
    join = lambda xs, ws: disjoint_mean(xs, elect_sign(xs, election), ws)
    return _merged(tasks, weights, stacks, lambda k, x: trim(x, density), join)


def dare(
    tasks: Tasks,
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    key: jax.Array | None = None,
    election: str | None = None,
    stacks: Mapping[str, int] = {},
) -> dict[str, jax.Array]:
    """DARE: drop entries at random, rescale the rest by ``1 / density``, then add or run TIES.

    Unbiased: the mean over keys of each dropped task is the task. The draw of a leaf depends on
    the key, the task's place, the canonical path and the layer.

    Args:
      density: ``1 - p``.
      key: of the drops; ``jax.random.key(0)`` by default.
      election: None adds (``sum_i w_i x_i``); ``total`` or ``frequency`` elects signs as in TIES.

    Source: arXiv 2311.03099; with an election as HF PEFT's ``dare_ties``.
    """
    join = _sum
    if election is not None:
        join = lambda xs, ws: disjoint_mean(xs, elect_sign(xs, election), ws)
    return _merged(tasks, weights, stacks, lambda k, x: drop(k, x, density), join, key)
