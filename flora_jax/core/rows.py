"""Rows of a batch that choose among adapters: named trees, or adapters in common arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapted import Bound
from flora_jax.core.adapter import Adapter, Params
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.leaf import Weight, is_leaf
from flora_jax.core.mixed import Group, Mixed
from flora_jax.core.plan import Entry, Plan
from flora_jax.core.registry import name_of
from flora_jax.core.uses import Use, bias_change, bound_of, seeing_bias, sibling_bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """K adapters of one plan in common arrays ``{path: {name: [*stack, K, ...]}}``.

    What :func:`flora_jax.bind` takes in place of K named trees, with ``rows``; a pool's arrays are
    ``[K, ...]``. ``engine.AdapterBank`` keeps one.
    """

    arrays: AdapterTree


def mixed(
    path: str, leaf: Weight, uses: list[Use], bias: jax.Array | None, picked: jax.Array
) -> Mixed:
    """A leaf whose rows choose among adapters; those of one configuration are one group."""
    entry = uses[0].entry
    if entry.spec.kind not in entry.adapter.kinds or entry.spec.kind in ("vector", "other"):
        raise PlanError(f"{path}: a {entry.spec.kind} weight cannot differ from row to row")
    alike: dict[Adapter, list[Use]] = {}
    for use in uses:
        alike.setdefault(use.entry.adapter, []).append(use)
    groups = tuple(_group(path, group, bias, picked) for group in alike.values())
    return Mixed(leaf, groups, entry.spec.unstacked())


def _group(path: str, uses: list[Use], bias: jax.Array | None, picked: jax.Array) -> Group:
    stack = uses[0].entry.stack
    join = lambda *arrays: jnp.stack(arrays, axis=len(stack))
    bound = jax.tree.map(join, *(seeing_bias(use, bias) for use in uses))
    shifts = [bias_change(use, bias, path) for use in uses]
    shift = None if shifts[0] is None else join(*shifts)
    hit = picked[:, None] == jnp.array([use.index for use in uses])
    return Group(bound, shift, *_over(stack, jnp.argmax(hit, axis=1), jnp.any(hit, axis=1)))


def _over(stack: tuple[int, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays repeated for every layer of a scanned stack."""
    return tuple(jnp.broadcast_to(a, (*stack, *a.shape)) for a in arrays)


def attach_stacked(
    params: Any, arrays: AdapterTree, plan: Plan, rows: jax.Array, key: jax.Array | None
) -> Any:
    """:func:`_attach` with rows, for adapters that lie in common arrays already."""
    leaves = paths.flatten(params, is_leaf=is_leaf)
    new: dict[str, Any] = {}
    for entry in plan:
        if entry.adapter.whole_stack or entry.adapter.per_example:
            name = name_of(entry.adapter)
            raise PlanError(f"{entry.path}: {name} does not lie in common arrays; bind named trees")
        leaf = leaves[entry.path]
        if tuple(leaf.shape) != entry.shape:
            raise StructureError(
                f"{entry.path}: shape {tuple(leaf.shape)}, the plan says {entry.shape}"
            )
        group = _stacked_group(entry, arrays, plan, leaves.get(sibling_bias(entry.path)), rows, key)
        new[entry.path] = Mixed(leaf, (group,), entry.spec.unstacked())
    return paths.map_with_path(lambda path, leaf: new.get(path, leaf), params, is_leaf=is_leaf)


def _stacked_group(
    entry: Entry,
    arrays: AdapterTree,
    plan: Plan,
    bias: jax.Array | None,
    rows: jax.Array,
    key: jax.Array | None,
) -> Group:
    own, stack = arrays[entry.path], entry.stack
    at = len(stack)
    count = jax.tree.leaves(own)[0].shape[at]
    each = lambda a: jnp.repeat(jnp.expand_dims(a, at), count, at)
    bound = seeing_bias(Use(entry, bound_of(entry, own, key, None), 0), bias)
    alike = {name: getattr(bound, name) for name in ("dropout", "basis", "bias")}
    pool = plan.pool_of(entry.adapter)
    shared = None if pool is None else dict(arrays[pool.path])
    if shared is not None:
        shared = {name: _over(stack, array)[0] for name, array in shared.items()}
    bound = dataclasses.replace(bound, pool=shared, **jax.tree.map(each, alike))
    change = lambda params: bias_change(Use(entry, _bare(params, entry), 0), bias, entry.path)
    shift = jax.vmap(change, at, at)(own)
    return Group(bound, shift, *_over(stack, jnp.clip(rows, 0, count - 1), rows >= 0))


def _bare(params: Params, entry: Entry) -> Bound:
    return Bound(params, None, None, None, None, None, None, entry.adapter)
