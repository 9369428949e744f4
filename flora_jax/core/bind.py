"""Join base, adapters and plan: bind, materialize, rebase."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapted import Adapted, Bound, Group, Mixed
from flora_jax.core.adapter import PRNG, Adapter, Params, output_sizes
from flora_jax.core.errors import FloraError, PlanError, StructureError
from flora_jax.core.initialize import AdapterTree, over_stack, path_keys
from flora_jax.core.leaf import Weight, WeightLeaf, is_leaf
from flora_jax.core.plan import Entry, Plan, Pool, check_adapters
from flora_jax.core.registry import name_of


def _named(adapters: Any, plan: Any) -> list[tuple[str | None, AdapterTree, Plan]]:
    """One or several adapters as ``(name, tree, plan)`` rows."""
    if isinstance(plan, Plan):
        values = list(adapters.values())
        nested = bool(values) and all(
            isinstance(v, Mapping) and v and all(isinstance(a, Mapping) for a in v.values())
            for v in values
        )
        if not nested:
            return [(None, adapters, plan)]
        return [(name, tree, plan) for name, tree in adapters.items()]
    if set(adapters) != set(plan):
        raise StructureError(
            f"adapters {sorted(adapters)} and plans {sorted(plan)} differ in names"
        )
    return [(name, adapters[name], plan[name]) for name in adapters]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """K adapters of one plan in common arrays ``{path: {name: [*stack, K, ...]}}``.

    What :func:`bind` takes in place of K named trees, with ``rows``; a pool's arrays are
    ``[K, ...]``. ``engine.AdapterBank`` keeps one.
    """

    arrays: AdapterTree


class Use(NamedTuple):
    """One adapter at one weight; ``index`` is the place of its name among the bound adapters."""

    entry: Entry
    bound: Bound
    index: int


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
      weights: per adapter name, arrays or floats (they may be traced: no recompile on change).
      rows: ``[N]`` int32, for a batch of N rows (the leading axis of every layer's input): the
        place of the row's adapter among the names, -1 for the base alone. It may be traced.
      example: features of each row, ``[N, ...]``, for methods that generate weights from them.
      rng: key of this step for adapter dropout; only used with ``train=True``.
      train: whether branches drop out.

    Raises:
      StructureError: adapters and plan differ; weights and adapter names differ.
      PlanError: a method without a form per row, or without the features it needs.
    """
    if isinstance(adapters, Stacked):
        if rows is None or weights is not None or example is not None:
            raise StructureError("adapters in common arrays take rows, no weights and no example")
        return _attach_stacked(params, adapters.arrays, plan, rows, rng if train else None)
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
        pools = {pool.adapter: tree[pool.path] for pool in one.pools}
        generated = _generate(one.pools, pools, example)
        for entry in one:
            bound = _bound(entry, tree[entry.path], key, None if weights is None else weights[name])
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


def _bound(entry: Entry, arrays: Params, key: jax.Array | None, weight: Any) -> Bound:
    adapter = entry.adapter
    frozen = {name for name, _, _ in entry.frozen}
    arrays = {n: jax.lax.stop_gradient(a) if n in frozen else a for n, a in arrays.items()}
    dropout = basis = None
    if key is not None and getattr(adapter, "dropout", 0.0) > 0.0:
        dropout = jax.random.key_data(path_keys(key, entry.path, entry.stack))
    if getattr(adapter, "seed", None) is not None:
        root = jax.random.key(adapter.seed, impl=PRNG)
        if adapter.shared_basis:
            basis = jnp.broadcast_to(jax.random.key_data(root), (*entry.stack, 2))
        else:
            basis = jax.random.key_data(path_keys(root, entry.path, entry.stack))
    if weight is not None:
        weight = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), entry.stack)
    return Bound(arrays, dropout, basis, weight, None, None, None, adapter)


def sibling_bias(path: str) -> str:
    """The path of the bias that a layer adds after this kernel."""
    return path.rpartition("/")[0] + "/bias" if "/" in path else "bias"


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
            new[path] = _mixed(path, leaf, uses, bias, picked)
        elif all(use.entry.adapter.value(use.bound.params) is not None for use in uses):
            # A kernel beside it may have come first: what it made of these values stays.
            new.setdefault(path, _replaced(leaf, uses))
        else:
            beside = found.get(sibling, [])
            adapted_bias = _bias(uses, beside, bias, path)
            if adapted_bias is not None:
                new[sibling] = adapted_bias
            own = _values(beside)
            bound = tuple(_seeing_bias(use, own.get(use.index, bias)) for use in uses)
            new[path] = Adapted(leaf, bound, entry.spec.unstacked())
    return paths.map_with_path(lambda path, leaf: new.get(path, leaf), params, is_leaf=is_leaf)


def _seeing_bias(use: Use, bias: jax.Array | None) -> Bound:
    """An adapter of the layer's output has to know the bias that is added after it."""
    if bias is None or not use.bound.acts:
        return use.bound
    entry = use.entry
    batch, n_out = output_sizes(entry.spec, entry.kernel_shape)
    outputs = math.prod((*entry.stack, *batch, n_out))
    if bias.size != outputs:
        raise PlanError(
            f"{entry.path}: a bias of shape {bias.shape} for {outputs} outputs; an adapter of the "
            "output needs one number for each"
        )
    return dataclasses.replace(use.bound, bias=bias)


def _replaced(leaf: Weight, uses: list[Use]) -> jax.Array:
    values = [use.bound.adapter.value(use.bound.params) for use in uses]
    if len(uses) == 1 and uses[0].bound.weight is None:
        return values[0]
    total = leaf
    for use, value in zip(uses, values):
        change, weight = value - leaf, use.bound.weight
        weight = jnp.ones(()) if weight is None else weight
        weight = jnp.reshape(weight, jnp.shape(weight) + (1,) * (change.ndim - jnp.ndim(weight)))
        total = total + (weight * change).astype(leaf.dtype)
    return total


def _bias_change(use: Use, bias: jax.Array | None, path: str) -> jax.Array | None:
    """What one adapter adds to the layer's bias, or None."""
    adapter, entry = use.entry.adapter, use.entry
    if bias is None:
        if getattr(adapter, "use_bias", False):
            raise StructureError(f"{path}: the adapter has a bias, the layer has none")
        return None
    if adapter.whole_stack:
        return None
    spec = entry.spec.unstacked()
    f = over_stack(lambda p, b: adapter.bias(p, b, spec), len(entry.stack))
    new = f(use.bound.params, bias)
    return None if new is None else new - bias


def _bias(
    uses: list[Use], beside: list[Use], bias: jax.Array | None, path: str
) -> jax.Array | None:
    """The layer's bias after every adapter that touches it, or None.

    ``beside`` are those that replace the bias itself: a kernel's adapter then starts from the value
    of its own set.
    """
    own = _values(beside)
    total = None
    for use in uses:
        change = _bias_change(use, own.get(use.index, bias), path)
        if change is None:
            continue
        if use.bound.weight is not None:
            change = change * use.bound.weight[..., None]
        total = change if total is None else total + change
    if total is None:
        return None
    return (_replaced(bias, beside) if beside else bias) + total.astype(bias.dtype)


def _values(uses: list[Use]) -> dict[int, jax.Array]:
    """The new leaf of each set that replaces it, by the set's index."""
    return {use.index: use.bound.adapter.value(use.bound.params) for use in uses}


def _mixed(
    path: str, leaf: Weight, uses: list[Use], bias: jax.Array | None, picked: jax.Array
) -> Mixed:
    """A leaf whose rows choose among adapters; those of one configuration are one group."""
    entry = uses[0].entry
    if entry.spec.kind not in entry.adapter.kinds or entry.spec.kind in ("vector", "other"):
        raise PlanError(f"{path}: a {entry.spec.kind} weight cannot differ from row to row")
    alike: dict[Adapter, list[Use]] = {}
    for use in uses:
        if use.entry.adapter.whole_stack or use.bound.example is not None:
            name = name_of(use.entry.adapter)
            raise PlanError(f"{path}: {name} has no form in which rows choose among adapters")
        alike.setdefault(use.entry.adapter, []).append(use)
    groups = tuple(_group(path, group, bias, picked) for group in alike.values())
    return Mixed(leaf, groups, entry.spec.unstacked())


def _group(path: str, uses: list[Use], bias: jax.Array | None, picked: jax.Array) -> Group:
    stack = uses[0].entry.stack
    join = lambda *arrays: jnp.stack(arrays, axis=len(stack))
    bound = jax.tree.map(join, *(_seeing_bias(use, bias) for use in uses))
    shifts = [_bias_change(use, bias, path) for use in uses]
    shift = None if shifts[0] is None else join(*shifts)
    hit = picked[:, None] == jnp.array([use.index for use in uses])
    return Group(bound, shift, *_over(stack, jnp.argmax(hit, axis=1), jnp.any(hit, axis=1)))


def _over(stack: tuple[int, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays repeated for every layer of a scanned stack."""
    return tuple(jnp.broadcast_to(a, (*stack, *a.shape)) for a in arrays)


def _attach_stacked(
    params: Any, arrays: AdapterTree, plan: Plan, rows: jax.Array, key: jax.Array | None
) -> Any:
    """:func:`_attach` with rows, for adapters that lie in common arrays already."""
    leaves = paths.flatten(params, is_leaf=is_leaf)
    new: dict[str, Any] = {}
    for entry in plan:
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
    bound = _seeing_bias(Use(entry, _bound(entry, own, key, None), 0), bias)
    alike = {name: getattr(bound, name) for name in ("dropout", "basis", "bias")}
    pool = plan.pool_of(entry.adapter)
    shared = None if pool is None else dict(arrays[pool.path])
    if shared is not None:
        shared = {name: _over(stack, array)[0] for name, array in shared.items()}
    bound = dataclasses.replace(bound, pool=shared, **jax.tree.map(each, alike))
    change = lambda params: _bias_change(Use(entry, _bare(params, entry), 0), bias, entry.path)
    shift = jax.vmap(change, at, at)(own)
    return Group(bound, shift, *_over(stack, jnp.clip(rows, 0, count - 1), rows >= 0))


def _bare(params: Params, entry: Entry) -> Bound:
    return Bound(params, None, None, None, None, None, None, entry.adapter)


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
