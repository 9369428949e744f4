"""One adapter at one weight, made ready to bind; and what adapters do to the layer's bias."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.core.adapted import Bound
from flora_jax.core.adapter import PRNG, Params, output_sizes
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.initialize import over_stack, path_keys
from flora_jax.core.leaf import Weight, dense
from flora_jax.core.plan import Entry, Pool
from flora_jax.core.registry import name_of


class Use(NamedTuple):
    """One adapter at one weight; ``index`` is the place of its name among the bound adapters."""

    entry: Entry
    bound: Bound
    index: int


def stopped(owner: Entry | Pool, arrays: Params) -> Params:
    """The arrays, the frozen ones without gradient."""
    frozen = {name for name, _, _ in owner.frozen}
    return {n: jax.lax.stop_gradient(a) if n in frozen else a for n, a in arrays.items()}


def bound_of(entry: Entry, arrays: Params, key: jax.Array | None, weight: Any) -> Bound:
    adapter = entry.adapter
    arrays = stopped(entry, arrays)
    if adapter.whole_stack:
        base = jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype))
        arrays = adapter.spread(arrays, entry.spec, base)
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


def seeing_bias(use: Use, bias: jax.Array | None) -> Bound:
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


def check_prefixes(path: str, uses: list[Use]) -> None:
    """A prefix is there or not: it has no sum with another one and no weight."""
    taken = [use for use in uses if use.bound.prefixed]
    if len(taken) > 1 or any(use.bound.weight is not None for use in taken):
        name = name_of(taken[0].entry.adapter)
        raise PlanError(
            f"{path}: {name} entries neither add up nor have weights; bind one such adapter, "
            "without weights, or choose among them with rows="
        )


def replaced(leaf: Weight, uses: list[Use]) -> jax.Array:
    values = [use.bound.adapter.value(use.bound.params) for use in uses]
    if len(uses) == 1 and uses[0].bound.weight is None:
        return values[0]
    total = old = over_stack(dense, len(uses[0].entry.stack))(leaf)
    for use, value in zip(uses, values):
        change, weight = value - old, use.bound.weight
        weight = jnp.ones(()) if weight is None else weight
        weight = jnp.reshape(weight, jnp.shape(weight) + (1,) * (change.ndim - jnp.ndim(weight)))
        total = total + (weight * change).astype(old.dtype)
    return total


def bias_change(use: Use, bias: jax.Array | None, path: str) -> jax.Array | None:
    """What one adapter adds to the layer's bias, or None."""
    adapter, entry = use.entry.adapter, use.entry
    if bias is None:
        if getattr(adapter, "use_bias", False):
            raise StructureError(f"{path}: the adapter has a bias, the layer has none")
        return None
    spec = entry.spec.unstacked()
    f = over_stack(lambda p, b: adapter.bias(p, b, spec), len(entry.stack))
    new = f(use.bound.params, bias)
    return None if new is None else new - bias


def adapted_bias(
    uses: list[Use], beside: list[Use], bias: jax.Array | None, path: str
) -> jax.Array | None:
    """The layer's bias after every adapter that touches it, or None.

    ``beside`` are those that replace the bias itself: a kernel's adapter then starts from the value
    of its own set.
    """
    own = values(beside)
    total = None
    for use in uses:
        change = bias_change(use, own.get(use.index, bias), path)
        if change is None:
            continue
        if use.bound.weight is not None:
            change = change * use.bound.weight[..., None]
        total = change if total is None else total + change
    if total is None:
        return None
    return (replaced(bias, beside) if beside else bias) + total.astype(bias.dtype)


def values(uses: list[Use]) -> dict[int, jax.Array]:
    """The new leaf of each set that replaces it, by the set's index."""
    return {use.index: use.bound.adapter.value(use.bound.params) for use in uses}
