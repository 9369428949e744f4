"""Fresh adapters for a plan, and the split of their arrays into trained and frozen."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapter import Params
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.leaf import Weight, WeightLeaf, dense, is_leaf
from flora_jax.core.observe import statistic_shape
from flora_jax.core.plan import Entry, Plan, check_adapters
from flora_jax.core.registry import name_of

AdapterTree = dict[str, Params]


def path_keys(key: jax.Array, path: str, stack: tuple[int, ...]) -> jax.Array:
    """Keys ``[*stack]`` for one path: folded by the canonical path, then by the blocks' indices.

    Scanned and unrolled models, and any sharding, get the same keys.
    """
    key = jax.random.fold_in(key, zlib.crc32(paths.canonical(path).encode()))
    indices = paths.block_indices(path)
    outer = range(math.prod(stack)) if stack else indices[:1] or (0,)
    inner = indices if stack else indices[1:]

    def fold(index: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(key, index)
        for n in inner:
            folded = jax.random.fold_in(folded, n)
        return folded

    return jax.vmap(fold)(jnp.array(outer)).reshape(stack)


def over_stack(f: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """``f`` vmapped over ``ndim`` leading axes."""
    for _ in range(ndim):
        f = jax.vmap(f)
    return f


def layer_by_layer(f: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """:func:`over_stack` as a loop: the scratch memory of one layer at a time."""

    def mapped(g: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *xs: jax.lax.map(lambda x: g(*x), xs)

    for _ in range(ndim):
        f = mapped(f)
    return f


def init(
    plan: Plan, key: jax.Array, params: Any, *, stats: Mapping[str, Mapping[str, Any]] | None = None
) -> AdapterTree:
    """Fresh adapters ``{path: {name: array}}`` (trained and frozen arrays) for a plan.

    Args:
      key: a typed PRNG key; each path folds its own.
      params: the base; values are read only by methods that need them.
      stats: ``{path: {statistic: array}}`` of :func:`flora_jax.calibrate`, for the methods whose
        start depends on the weights' inputs.

    Raises:
      PlanError: a method needs statistics that ``stats`` lacks.
      StructureError: a statistic is of another shape than the weight's inputs give.
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    out: AdapterTree = {}
    for entry in plan:
        found = _statistics(entry, stats or {})
        if entry.adapter.whole_stack:
            keys = path_keys(key, entry.path, ())
        else:
            keys = path_keys(key, entry.path, entry.stack)
        out[entry.path] = _init_entry(entry, keys, leaves[entry.path], found)
    for pool in plan.pools:
        train, frozen = pool.adapter.pool(path_keys(key, pool.path, ()), pool.entries)
        out[pool.path] = _strong({**train, **frozen})
    return out


def _statistics(entry: Entry, stats: Mapping[str, Mapping[str, Any]]) -> Params:
    """The statistics that an entry's method reads."""
    given = stats.get(entry.path, {})
    missing = [name for name in entry.adapter.statistics if name not in given]
    if missing:
        raise PlanError(
            f"{entry.path}: {name_of(entry.adapter)} starts from the weight's inputs and needs "
            f"their {', '.join(missing)}; pass stats=flora.calibrate(apply, params, plan, batches)"
        )
    for name in entry.adapter.statistics:
        inner = statistic_shape(name, entry.spec.unstacked(), entry.kernel_shape)
        found = tuple(jnp.shape(given[name]))
        if found != (*entry.stack, *inner):
            raise StructureError(
                f"{entry.path}: the statistic {name} has shape {found}, the weight's inputs give "
                f"{(*entry.stack, *inner)}"
            )
    return {name: jnp.asarray(given[name]) for name in entry.adapter.statistics}


def _init_entry(entry: Entry, keys: jax.Array, leaf: Weight, stats: Params) -> Params:
    adapter = entry.adapter
    n = 0 if adapter.whole_stack else len(entry.stack)
    spec = entry.spec if adapter.whole_stack else entry.spec.unstacked()
    further = (stats,) if adapter.statistics else ()
    # Statistics are [in, in] a layer: their factorisations are not held for all layers at once.
    over = layer_by_layer if adapter.statistics else over_stack
    if adapter.needs_base:
        outer = len(entry.stack)
        low_bit = isinstance(leaf, WeightLeaf)
        values = over_stack(dense, outer)(leaf) if low_bit else jnp.asarray(leaf)
        f = over(lambda k, b, *s: adapter.init(k, spec, b, *s), n)
        train, frozen = jax.jit(f)(keys, values, *further)
    else:
        shape = entry.shape if adapter.whole_stack else entry.kernel_shape
        base = jax.ShapeDtypeStruct(shape, jnp.dtype(entry.dtype))
        f = over(lambda k, *s: adapter.init(k, spec, base, *s), n)
        train, frozen = f(keys, *further)
    return _strong(adapter.finish({**train, **frozen}))


def _strong(arrays: Params) -> Params:
    """Without weak types, which would make the first optimiser update recompile everything."""
    return jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), arrays)


def partition(adapters: AdapterTree, plan: Plan) -> tuple[AdapterTree, AdapterTree]:
    """``(trained, frozen)``: the tree to differentiate and the buffers beside it."""
    check_adapters(adapters, plan)
    train, frozen = {}, {}
    for owner in plan.owners:
        names = {name for name, _, _ in owner.train}
        arrays = adapters[owner.path]
        train[owner.path] = {n: a for n, a in arrays.items() if n in names}
        rest = {n: a for n, a in arrays.items() if n not in names}
        if rest:
            frozen[owner.path] = rest
    return train, frozen


def combine(train: AdapterTree, frozen: AdapterTree) -> AdapterTree:
    """The inverse of :func:`partition`."""
    return {path: {**arrays, **frozen.get(path, {})} for path, arrays in train.items()}
