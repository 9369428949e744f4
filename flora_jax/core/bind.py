"""Join base, adapters and plan: init, bind, materialize, partition, rebase."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapter import PRNG, Adapter, Context, Params
from flora_jax.core.contraction import Contraction
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.leaf import Weight, WeightLeaf, dense, is_leaf
from flora_jax.core.operators import Base, Inputs, LinearMap, Scale, Sum, delta
from flora_jax.core.plan import Entry, Plan, check_adapters
from flora_jax.core.spec import KernelSpec

AdapterTree = dict[str, Params]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bound:
    """One adapter's arrays at one weight; keys are raw threefry data, which scan can slice."""

    params: Params
    dropout: jax.Array | None
    basis: jax.Array | None
    weight: jax.Array | None
    adapter: Adapter = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(WeightLeaf):
    """Base weight and the adapters on it; a pytree whose first leaf is the base."""

    base: Weight
    bound: tuple[Bound, ...]
    spec: KernelSpec = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return tuple(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    def operator(self) -> LinearMap:
        """The expression of the (unstacked) adapted weight."""
        base = Base(self.base, self.spec)
        if len(self.bound) == 1 and self.bound[0].weight is None:
            return _expression(self.bound[0], base)
        terms: list[LinearMap] = [base]
        for bound in self.bound:
            change = delta(_expression(bound, base), base)
            terms.append(change if bound.weight is None else Scale(bound.weight, change))
        return Sum(*terms)

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        self._check(how)
        return how.leave(self.operator().apply(Inputs(how, x)))

    def attend(self, x, precision=None):
        return self.operator().T.then(x)

    def dense(self, dtype=None):
        matrix = self.operator().dense()
        return self.spec.restore(matrix, self.shape).astype(dtype or self.dtype)

    def _check(self, how: Contraction) -> None:
        ours, theirs = self.spec, how.spec
        same = (ours.batch_axes, ours.in_axes, ours.out_axes, ours.groups)
        if same != (theirs.batch_axes, theirs.in_axes, theirs.out_axes, theirs.groups):
            raise PlanError(
                f"a weight of shape {self.shape} was planned as {ours} and is used as {theirs}; "
                "pass specs= to flora.plan"
            )


def _expression(bound: Bound, base: Base) -> LinearMap:
    wrap = lambda data: None if data is None else jax.random.wrap_key_data(data, impl=PRNG)
    shape = tuple(base.weight.shape)
    ctx = Context(base, shape, wrap(bound.dropout), wrap(bound.basis))
    return bound.adapter.operator(bound.params, base.spec, ctx)


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


def init(plan: Plan, key: jax.Array, params: Any) -> AdapterTree:
    """Fresh adapters ``{path: {name: array}}`` (trained and frozen arrays) for a plan.

    Args:
      key: a typed PRNG key; each path folds its own.
      params: the base; values are read only by methods that need them.
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    out: AdapterTree = {}
    for entry in plan:
        keys = path_keys(key, entry.path, entry.stack)
        out[entry.path] = _init_entry(entry, keys, leaves[entry.path])
    return out


def _init_entry(entry: Entry, keys: jax.Array, leaf: Weight) -> Params:
    adapter, spec = entry.adapter, entry.spec.unstacked()
    n = len(entry.stack)
    if adapter.needs_base:
        values = over_stack(dense, n)(leaf) if isinstance(leaf, WeightLeaf) else jnp.asarray(leaf)
        train, frozen = jax.jit(over_stack(lambda k, b: adapter.init(k, spec, b), n))(keys, values)
    else:
        base = jax.ShapeDtypeStruct(entry.kernel_shape, jnp.dtype(entry.dtype))
        train, frozen = over_stack(lambda k: adapter.init(k, spec, base), n)(keys)
    # A weak type would make the first optimiser update recompile everything.
    strong = lambda a: jax.lax.convert_element_type(a, a.dtype)
    return jax.tree.map(strong, {**train, **frozen})


def partition(adapters: AdapterTree, plan: Plan) -> tuple[AdapterTree, AdapterTree]:
    """``(trained, frozen)``: the tree to differentiate and the buffers beside it."""
    check_adapters(adapters, plan)
    train, frozen = {}, {}
    for entry in plan:
        names = {name for name, _, _ in entry.train}
        arrays = adapters[entry.path]
        train[entry.path] = {n: a for n, a in arrays.items() if n in names}
        rest = {n: a for n, a in arrays.items() if n not in names}
        if rest:
            frozen[entry.path] = rest
    return train, frozen


def combine(train: AdapterTree, frozen: AdapterTree) -> AdapterTree:
    """The inverse of :func:`partition`."""
    return {path: {**arrays, **frozen.get(path, {})} for path, arrays in train.items()}


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


def bind(
    params: Any,
    adapters: Any,
    plan: Plan | Mapping[str, Plan],
    *,
    weights: Mapping[str, Any] | Sequence[Any] | None = None,
    rng: jax.Array | None = None,
    train: bool = False,
) -> Any:
    """``params`` with :class:`Adapted` leaves where the plan says so. Pure and free of copies.

    ``W_bound = W0 + sum_i weight_i * (W_i(adapter_i) - W0)``; one unweighted adapter gives W_1.

    Args:
      adapters: ``{path: {name: array}}``, or ``{adapter name: such a tree}``.
      plan: the plan, or ``{adapter name: plan}``.
      weights: per adapter name, arrays or floats (they may be traced: no recompile on change).
      rng: key of this step for adapter dropout; only used with ``train=True``.
      train: whether branches drop out.

    Raises:
      StructureError: adapters and plan differ; weights and adapter names differ.
    """
    rows = _named(adapters, plan)
    names = [name for name, _, _ in rows]
    if weights is not None and not isinstance(weights, Mapping):
        weights = dict(zip(names, weights, strict=True))
    if weights is not None and set(weights) != set(names):
        raise StructureError(f"weights for {sorted(weights)}, adapters are {names}")
    found: dict[str, list[tuple[Entry, Bound]]] = {}
    for name, tree, one in rows:
        check_adapters(tree, one)
        key = rng if train else None
        if key is not None and name is not None:
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        for entry in one:
            bound = _bound(entry, tree[entry.path], key, None if weights is None else weights[name])
            found.setdefault(entry.path, []).append((entry, bound))
    return _attach(params, found)


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
    return Bound(arrays, dropout, basis, weight, adapter)


def _attach(params: Any, found: Mapping[str, list[tuple[Entry, Bound]]]) -> Any:
    leaves = paths.flatten(params, is_leaf=is_leaf)
    missing = [path for path in found if path not in leaves]
    if missing:
        near = paths.nearest(missing[0], leaves)
        raise StructureError(f"params have no {missing[0]!r}; nearest: {', '.join(near)}")
    new: dict[str, Any] = {}
    for path, rows in found.items():
        entry = rows[0][0]
        leaf = leaves[path]
        if tuple(leaf.shape) != entry.shape:
            raise StructureError(f"{path}: shape {tuple(leaf.shape)}, the plan says {entry.shape}")
        if all(bound.adapter.value(bound.params) is not None for _, bound in rows):
            new[path] = _replaced(leaf, [bound for _, bound in rows])
            continue
        new[path] = Adapted(leaf, tuple(bound for _, bound in rows), entry.spec.unstacked())
        sibling = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
        bias = _bias(rows, leaves.get(sibling), path)
        if bias is not None:
            new[sibling] = bias
    return paths.map_with_path(lambda path, leaf: new.get(path, leaf), params, is_leaf=is_leaf)


def _replaced(leaf: Weight, rows: list[Bound]) -> jax.Array:
    if len(rows) == 1 and rows[0].weight is None:
        return rows[0].adapter.value(rows[0].params)
    total = leaf
    for bound in rows:
        change = bound.adapter.value(bound.params) - leaf
        weight = 1.0 if bound.weight is None else bound.weight
        weight = jnp.reshape(weight, jnp.shape(weight) + (1,) * (change.ndim - jnp.ndim(weight)))
        total = total + (weight * change).astype(leaf.dtype)
    return total


def _bias(rows, bias: jax.Array | None, path: str) -> jax.Array | None:
    """The layer's bias after every adapter that touches it, or None."""
    if bias is None:
        if any(getattr(bound.adapter, "use_bias", False) for _, bound in rows):
            raise StructureError(f"{path}: the adapter has a bias, the layer has none")
        return None
    total = None
    for entry, bound in rows:
        spec = entry.spec.unstacked()
        f = over_stack(lambda p, b: bound.adapter.bias(p, b, spec), len(entry.stack))  # noqa: B023
        new = f(bound.params, bias)
        if new is None:
            continue
        change = new - bias
        if bound.weight is not None:
            change = change * bound.weight[..., None]
        total = change if total is None else total + change
    return None if total is None else bias + total.astype(bias.dtype)


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
        if not isinstance(leaf, Adapted):
            return leaf
        low_bit = isinstance(leaf.base, WeightLeaf)
        if low_bit and quantized == "error":
            raise PlanError(
                f"{path}: merging into a low-bit base; pass quantized='dequantize' or 'requantize'"
            )
        merged = over_stack(lambda a: a.dense(), len(leaf.shape) - leaf.spec.ndim)(leaf)
        return leaf.base.like(merged) if low_bit and quantized == "requantize" else merged

    return paths.map_with_path(one, bound, is_leaf=is_leaf)


def split(bound: Any) -> Any:
    """The base parameters of a bound tree (Adapted leaves replaced by their base)."""
    return jax.tree.map(
        lambda leaf: leaf.base if isinstance(leaf, Adapted) else leaf, bound, is_leaf=is_leaf
    )


def rebase(params: Any, adapters: AdapterTree, plan: Plan) -> tuple[Any, AdapterTree]:
    """Fold the frozen parts of methods that edit the base (PiSSA ...) into the weights.

    ``bind`` is exact without it; afterwards each step saves the frozen branch, and a quantiser
    sees the residual. Keep the original adapters to export or to undo.
    """
    check_adapters(adapters, plan)
    leaves = paths.flatten(params, is_leaf=is_leaf)
    new, out = {}, dict(adapters)
    for entry in plan:
        if not entry.frozen or isinstance(leaves[entry.path], WeightLeaf):
            continue
        spec, fold = entry.spec.unstacked(), entry.adapter.rebase
        f = over_stack(lambda b, p: fold(b, p, spec), len(entry.stack))  # noqa: B023
        new[entry.path], out[entry.path] = f(leaves[entry.path], adapters[entry.path])
    return paths.map_with_path(lambda p, leaf: new.get(p, leaf), params, is_leaf=is_leaf), out
