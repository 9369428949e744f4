"""Named adapters of any methods as one adapter: weighted sum, TIES, DARE, pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import merging
from flora_jax.core import paths
from flora_jax.core.errors import ConfigError, PlanError, unknown
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.leaf import is_leaf
from flora_jax.core.plan import Plan
from flora_jax.core.uses import sibling_bias
from flora_jax.engine.build import Builder, Converted
from flora_jax.engine.changes import Change, changes
from flora_jax.engine.compress import Target, compress, from_matrix

SUMS = ("linear", "cat", "svd")
SPARSE = ("ties", "dare", "dare_ties", "magnitude_prune")


def combine_adapters(
    params: Any,
    adapters: Mapping[str, AdapterTree],
    plan: Plan | Mapping[str, Plan],
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    method: str = "linear",
    as_: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    randomized: bool | None = None,
    density: float | None = None,
    election: str = "total",
    key: jax.Array | None = None,
) -> Converted:
    """One adapter for named adapters of any methods, merged on their exact changes of the weights.

    ``dW_i = W_i - W0`` of each adapter, then by ``method``:
      ``linear``           ``sum_i w_i dW_i``, exact factors where there are any
      ``cat``              the same, by rank concatenation only: an error where it is not exact
      ``svd``              the same, cut to a rank, energy or error
      ``ties``             trim, elect a sign, disjoint mean (arXiv 2306.01708)
      ``dare``             drop at random and rescale, then the sum (arXiv 2311.03099)
      ``dare_ties``        drop at random and rescale, elect a sign, disjoint mean
      ``magnitude_prune``  trim, then the sum

    The same names in HF-PEFT's ``add_weighted_adapter`` work on the LoRA factors: its ``linear``
    and, without ``_svd``, its ``ties`` and ``dare`` merge all A's and all B's separately, so that
    the product has cross terms ``B_i A_j`` and is not a merge of the changes. Here every method is,
    like its ``cat`` and ``*_svd``. A weight that an adapter lacks is merged from the others.

    Args:
      adapters, plan: ``{name: tree}`` with one plan or ``{name: plan}``.
      weights: by name or in order; 1 by default. In TIES they follow the election, as in PEFT.
      as_: ``lora`` (see :func:`flora_jax.to_lora` for the limits) or ``replace``: the dense new
        weights, nothing lost but rounding to the weights' dtype.
      rank, energy, error, randomized: limits of the LoRA, as for :func:`flora_jax.to_lora`.
      density: share of entries that stay, for the last four methods; per weight and layer.
      election: ``total`` or ``frequency``; how TIES elects signs.
      key: of DARE's drops.

    Returns:
      ``(plan, adapters, report)``.

    Raises:
      ConfigError: unknown method or form; a density that is missing or has no use.
      PlanError: a method that does not merge; see :func:`flora_jax.to_lora`.
    """
    target = Target(rank=rank, energy=energy, error=error, randomized=randomized)
    _check(method, as_, density, target)
    weights = _by_name(adapters, weights)
    if method in SUMS:
        found = ((c, None, c.bias) for c in changes(params, adapters, plan, weights))
    else:
        rule = _rule(method, density, election, key)
        found = _sparse(params, adapters, plan, weights, rule)
    built = Builder()
    for change, matrix, bias in found:
        if change.is_kernel and as_ == "lora":
            _put_lora(built, change, matrix, bias, target, method)
            continue
        built.replace(change, change.restored(change.matrix() if matrix is None else matrix))
        if bias is not None:
            before = paths.flatten(params, is_leaf=is_leaf)[sibling_bias(change.path)]
            built.replace_bias(change, before, bias)
    return built.done()


def _check(method: str, as_: str, density: float | None, target: Target) -> None:
    if method not in SUMS + SPARSE:
        raise ConfigError(unknown("method", method, SUMS + SPARSE))
    if as_ not in ("lora", "replace"):
        raise ConfigError(unknown("form", as_, ("lora", "replace")))
    if (density is not None) != (method in SPARSE):
        raise ConfigError(
            f"method={method!r} with density={density}: "
            + ", ".join(SPARSE)
            + " take one, no other does"
        )
    if as_ == "replace" and target.given:
        raise ConfigError(
            "as_='replace' keeps the whole change: rank=, energy= and error= do not apply"
        )
    if method == "svd" and as_ == "lora" and not target.given:
        raise ConfigError("method='svd' needs rank=, energy= or error=")
    if method == "cat" and (target.given or as_ != "lora"):
        raise ConfigError("method='cat' is exact and low-rank: no limit and no other form")


def _by_name(adapters: Mapping[str, Any], weights: Any) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(adapters, 1.0)
    if not isinstance(weights, Mapping):
        weights = dict(zip(adapters, weights, strict=True))
    if set(weights) != set(adapters):
        raise ConfigError(f"weights for {sorted(weights)}, adapters are {sorted(adapters)}")
    return dict(weights)


def _rule(method: str, density: float, election: str, key: jax.Array | None) -> Callable[..., Any]:
    """The chosen merger of ``(tasks, weights, stacks=)``."""
    if method == "ties":
        return functools.partial(merging.ties, density=density, election=election)
    if method == "magnitude_prune":
        return functools.partial(merging.magnitude_prune, density=density)
    elected = election if method == "dare_ties" else None
    return functools.partial(merging.dare, density=density, key=key, election=elected)


def _put_lora(
    built: Builder, change: Change, matrix: Any, bias: Any, target: Target, method: str
) -> None:
    if matrix is not None:
        if not target.given:
            raise PlanError(
                f"{change.path}: {method} gives no low-rank change; give rank=, energy= or error="
            )
        kept = from_matrix(matrix, target, change.path)
    elif method == "cat" and change.factors() is None:
        raise PlanError(
            f"{change.path}: 'cat' needs low-rank factors of every change; take 'svd' and a rank"
        )
    else:
        kept = compress(change, target)
    built.lora(change, kept, bias)


def _sparse(
    params: Any, adapters: Any, plan: Any, weights: Mapping[str, float], rule: Callable[..., Any]
) -> Iterator[tuple[Change, jax.Array, jax.Array | None]]:
    """``(a change at the path, merged dW, merged bias change)``; one weight's dW's at a time."""
    tasks: list[dict[str, Callable[[], jax.Array]]] = []
    planned: dict[str, Change] = {}
    for name, tree in adapters.items():
        one = plan if isinstance(plan, Plan) else plan[name]
        task: dict[str, Callable[[], jax.Array]] = {}
        for change in changes(params, tree, one):
            planned.setdefault(change.path, change)
            task[change.path] = change.matrix
            if change.bias is not None:
                task[sibling_bias(change.path)] = functools.partial(jnp.asarray, change.bias)
        tasks.append(task)

    def merged(path: str, depth: int) -> jax.Array | None:
        found = [{path: task[path]()} if path in task else {} for task in tasks]
        if not any(found):
            return None
        return rule(found, [weights[name] for name in adapters], stacks={path: depth})[path]

    for path, change in planned.items():
        bias = sibling_bias(path)
        own = None if bias in planned or bias == path else merged(bias, change.depth)
        yield change, merged(path, change.depth), own
