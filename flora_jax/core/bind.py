"""Join base, adapters and plan: bind, materialize, rebase."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapted import Adapted, Bound
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import FloraError, PlanError, StructureError
from flora_jax.core.initialize import AdapterTree, over_stack
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.core.mixed import Mixed
from flora_jax.core.plan import Entry, Plan, Pool, check_adapters
from flora_jax.core.registry import name_of
from flora_jax.core.rows import Stacked, attach_stacked, mixed
from flora_jax.core.uses import (
    Use,
    adapted_bias,
    bound_of,
    check_prefixes,
    replaced,
    seeing_bias,
    sibling_bias,
    stopped,
    values,
)


def _named(adapters: Any, plan: Any) -> list[tuple[str | None, AdapterTree, Plan]]:
    """One or several adapters as ``(name, tree, plan)`` rows.

    In the order of the plans, which are static, or of the sorted names: ``jit`` sorts the keys of
    its arguments, so that the order of ``adapters`` would be another inside it than outside.
    """
    if isinstance(plan, Plan):
        values = list(adapters.values())
        nested = bool(values) and all(
            isinstance(v, Mapping) and v and all(isinstance(a, Mapping) for a in v.values())
            for v in values
        )
        if not nested:
            return [(None, adapters, plan)]
        return [(name, adapters[name], plan) for name in sorted(adapters)]
    if set(adapters) != set(plan):
        raise StructureError(
            f"adapters {sorted(adapters)} and plans {sorted(plan)} differ in names"
        )
    return [(name, adapters[name], plan[name]) for name in plan]


def bind(
    params: Any,
    adapters: Any,
    plan: Plan | Mapping[str, Plan],
    *,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    rows: jax.Array | None = None,
    example: Any = None,
    rng: jax.Array | None = None,
    train: bool = False,
) -> Any:
    """``params`` with :class:`Adapted` leaves where the plan says so. Pure and free of copies.

    ``W_bound = W0 + sum_i weight_i * (W_i(adapter_i) - W0)``; one unweighted adapter gives W_1.
    With ``rows`` each row n of the batch has ``W_{rows[n]}`` for itself, or ``W0`` where it is -1.

    Args:
      adapters: ``{path: {name: array}}``, ``{adapter name: such a tree}``, or :class:`Stacked`.
      plan: the plan, or ``{adapter name: plan}``.
      weights: per adapter name, or in the order of rows, arrays or floats (they may be traced: no
        recompile on change).
      rows: ``[N]`` int32, for a batch of N rows (the leading axis of every layer's input): the
        place of the row's adapter among the names of ``plan``, or among the sorted names when one
        plan serves all; -1 for the base alone. It may be traced.
      example: features of each row, ``[N, ...]``, for methods that generate weights from them; with
        one row its weights serve any batch and can be merged. They are generated here: bind once
        outside a decoding loop.
      rng: key of this step for adapter dropout; only used with ``train=True``.
      train: whether branches drop out.

    Raises:
      StructureError: adapters and plan differ; weights and adapter names differ.
      PlanError: a weight that cannot differ from row to row, or features are missing.
    """
    if isinstance(adapters, Stacked):
        if rows is None or weights is not None or example is not None:
            raise StructureError("adapters in common arrays take rows, no weights and no example")
        return attach_stacked(params, adapters.arrays, plan, rows, rng if train else None)
    named = _named(adapters, plan)
    names = [name for name, _, _ in named]
    if weights is not None and not isinstance(weights, Mapping):
        weights = dict(zip(names, weights, strict=True))
    if weights is not None and set(weights) != set(names):
        raise StructureError(f"weights for {sorted(weights)}, adapters are {names}")
    if rows is not None and (names == [None] or weights is not None):
        raise StructureError("rows choose among named adapters {name: tree}, without weights")
    found: dict[str, list[Use]] = {}
    for index, (name, tree, one) in enumerate(named):
        check_adapters(tree, one)
        key = rng if train else None
        if key is not None and name is not None:
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        pools = {pool.adapter: stopped(pool, tree[pool.path]) for pool in one.pools}
        generated = _generate(one.pools, pools, example)
        for entry in one:
            bound = bound_of(
                entry, tree[entry.path], key, None if weights is None else weights[name]
            )
            bound = _with_pool(entry, bound, pools, generated)
            found.setdefault(entry.path, []).append(Use(entry, bound, index))
    return _attach(params, found, rows)


def _generate(pools: Sequence[Pool], arrays: Mapping[Adapter, Any], example: Any) -> dict[str, Any]:
    """What methods make of the rows' features, ``{path: {name: array}}``."""
    out: dict[str, Any] = {}
    for pool in pools:
        if not pool.adapter.per_example:
            continue
        if example is None:
            raise PlanError(
                f"{pool.path}: {name_of(pool.adapter)} makes weights from each row's features; "
                "pass example= to flora.bind (in a batch: the array 'example')"
            )
        out |= pool.adapter.generate(arrays[pool.adapter], example, pool.entries)
    return out


def _with_pool(entry: Entry, bound: Bound, pools: Any, generated: Mapping[str, Any]) -> Bound:
    """A bound adapter with what it shares with others and what was generated for it."""
    if entry.path in generated:
        return dataclasses.replace(bound, example=generated[entry.path])
    if entry.adapter not in pools:
        return bound
    repeat = lambda a: jnp.broadcast_to(a, (*entry.stack, *a.shape))
    return dataclasses.replace(bound, pool=jax.tree.map(repeat, pools[entry.adapter]))


def _attach(params: Any, found: Mapping[str, list[Use]], picked: jax.Array | None) -> Any:
    leaves = paths.flatten(params, is_leaf=is_leaf)
    missing = [path for path in found if path not in leaves]
    if missing:
        near = paths.nearest(missing[0], leaves)
        raise StructureError(f"params have no {missing[0]!r}; nearest: {', '.join(near)}")
    new: dict[str, Any] = {}
    for path, uses in found.items():
        entry = uses[0].entry
        leaf = leaves[path]
        if tuple(leaf.shape) != entry.shape:
            raise StructureError(f"{path}: shape {tuple(leaf.shape)}, the plan says {entry.shape}")
        sibling = sibling_bias(path)
        bias = leaves.get(sibling)
        if picked is not None:
            new[path] = mixed(path, leaf, uses, bias, picked)
        elif all(use.entry.adapter.value(use.bound.params) is not None for use in uses):
            # A kernel beside it may have come first: what it made of these values stays.
            new.setdefault(path, replaced(leaf, uses))
        else:
            beside = found.get(sibling, [])
            new_bias = adapted_bias(uses, beside, bias, path)
            if new_bias is not None:
                new[sibling] = new_bias
            own = values(beside)
            check_prefixes(path, uses)
            bound = tuple(seeing_bias(use, own.get(use.index, bias)) for use in uses)
            new[path] = Adapted(leaf, bound, entry.spec.unstacked())
    return paths.map_with_path(lambda path, leaf: new.get(path, leaf), params, is_leaf=is_leaf)


def materialize(bound: Any, *, quantized: str = "error") -> Any:
    """Plain arrays with the structure, shapes and dtypes of the base: the explicit merge.

    Args:
      quantized: an adapter on a low-bit base: ``error``, ``dequantize`` (a dense array) or
        ``requantize`` (the base's own format again; lossy).

    Raises:
      PlanError: a low-bit base is to be merged and ``quantized`` was not chosen.
    """
    if quantized not in ("error", "dequantize", "requantize"):
        raise PlanError(f"quantized={quantized!r} is not error, dequantize or requantize")

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Adapted | Mixed):
            return leaf
        low_bit = isinstance(leaf.base, WeightLeaf)
        if low_bit and quantized == "error":
            raise PlanError(
                f"{path}: merging into a low-bit base; pass quantized='dequantize' or 'requantize'"
            )
        try:
            merged = over_stack(lambda a: a.dense(), len(leaf.shape) - leaf.spec.ndim)(leaf)
        except FloraError as error:
            raise type(error)(f"{path}: {error}") from None
        return leaf.base.like(merged) if low_bit and quantized == "requantize" else merged

    return paths.map_with_path(one, bound, is_leaf=is_leaf)


def split(bound: Any) -> Any:
    """The base parameters of a bound tree (Adapted leaves replaced by their base)."""
    base = lambda leaf: leaf.base if isinstance(leaf, Adapted | Mixed) else leaf
    return jax.tree.map(base, bound, is_leaf=is_leaf)


def rebase(params: Any, adapters: AdapterTree, plan: Plan) -> tuple[Any, AdapterTree]:
    """Fold the frozen parts of methods that edit the base (PiSSA ...) into the weights.

    ``bind`` is exact without it; afterwards each step saves the frozen branch, and a quantiser
    sees the residual. Keep the original adapters to export or to undo.
    """
    check_adapters(adapters, plan)
    leaves = paths.flatten(params, is_leaf=is_leaf)
    new, out = {}, dict(adapters)
    for entry in plan:
        low_bit = isinstance(leaves[entry.path], WeightLeaf)
        if not entry.frozen or low_bit or entry.adapter.whole_stack:
            continue
        spec, fold = entry.spec.unstacked(), entry.adapter.rebase
        f = over_stack(lambda b, p: fold(b, p, spec), len(entry.stack))  # noqa: B023
        new[entry.path], out[entry.path] = f(leaves[entry.path], adapters[entry.path])
    return paths.map_with_path(lambda p, leaf: new.get(p, leaf), params, is_leaf=is_leaf), out
