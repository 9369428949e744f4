"""LoRAs of different ranks brought to one configuration, so that one program serves them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flora_jax.adapters.lora import LoRA
from flora_jax.core.adapter import Params
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.plan import Entry, Plan, check_adapters, make_entry
from flora_jax.core.registry import name_of


def pad_rank(
    adapters: Mapping[str, AdapterTree],
    plans: Mapping[str, Plan],
    rank: int | None = None,
) -> tuple[Plan, dict[str, AdapterTree]]:
    """Named adapters of the LoRA family under one plan: ``(plan, {name: tree})``, same functions.

    Every weight that any of them adapts gets one configuration: the largest rank there (or
    ``rank``), zeros in the components that an adapter lacks, and one scale. Where the scales agree
    it is kept; else it becomes 1 and the old one is folded into ``b`` (and the bias). An adapter
    without a weight gets a LoRA of zeros there.

    ``bind(rows=)`` then has one group a weight, and other adapters of the plan do not recompile.

    Args:
      adapters, plans: by name; LoRA, rsLoRA, DoRA, PiSSA, OLoRA and their kin, each weight of one
        method in all of them (:func:`flora_jax.to_lora` makes others LoRAs).
      rank: of all weights; not below any adapter's.

    Raises:
      StructureError: names, shapes or methods differ.
      PlanError: not of the family; a rank above ``rank``; a method that zeros do not switch off is
        missing in some adapter.
    """
    if set(adapters) != set(plans):
        raise StructureError(f"adapters {sorted(adapters)} and plans {sorted(plans)} differ")
    for name, plan in plans.items():
        check_adapters(adapters[name], plan)
    paths = dict.fromkeys(entry.path for plan in plans.values() for entry in plan)
    entries = []
    trees: dict[str, AdapterTree] = {name: {} for name in adapters}
    for path in sorted(paths):
        own = {n: entry for n, plan in plans.items() for entry in plan if entry.path == path}
        entry = _common(path, own, len(own) == len(plans), rank)
        entries.append(entry)
        for name in adapters:
            arrays = adapters[name].get(path)
            trees[name][path] = _padded(arrays, own.get(name), entry)
    return Plan(tuple(entries)), trees


def _common(path: str, own: Mapping[str, Entry], everywhere: bool, rank: int | None) -> Entry:
    """The entry that all adapters of a weight fit."""
    first = next(iter(own.values()))
    for name, entry in own.items():
        if not isinstance(entry.adapter, LoRA):
            what = name_of(entry.adapter)
            raise PlanError(f"{path}: {what} of {name!r} is not of the LoRA family; see to_lora")
        if type(entry.adapter) is not type(first.adapter):
            what = f"{name_of(first.adapter)} and {name_of(entry.adapter)}"
            raise StructureError(f"{path}: {what} are two methods; see to_lora")
        if (entry.spec, entry.shape) != (first.spec, first.shape):
            raise StructureError(f"{path}: shapes {first.shape} and {entry.shape} differ")
    if not everywhere and type(first.adapter) is not LoRA:
        raise PlanError(
            f"{path}: not every adapter has it, and a {name_of(first.adapter)} of zeros is not the "
            "base; see to_lora"
        )
    chosen = [entry.adapter for entry in own.values()]
    _check_agree(path, chosen)
    largest = max(adapter.rank for adapter in chosen)
    if rank is not None and rank < largest:
        raise PlanError(f"{path}: rank={rank} is below the {largest} of an adapter")
    rank = rank or largest
    scales = {adapter.scale for adapter in chosen}
    scale = scales.pop() if len(scales) == 1 else 1.0
    common = dataclasses.replace(
        first.adapter,
        rank=rank,
        alpha=scale * rank,
        rslora=False,
        use_bias=any(adapter.use_bias for adapter in chosen),
    )
    return make_entry(path, common, first.spec, first.shape, first.dtype)


def _check_agree(path: str, chosen: list[LoRA]) -> None:
    """Fields that change what trained arrays mean must agree; the rest come from the first."""
    free = {"rank", "alpha", "rslora", "use_bias", "initializer", "dropout"}
    for field in dataclasses.fields(chosen[0]):
        values = {getattr(adapter, field.name) for adapter in chosen}
        if field.name not in free and len(values) > 1:
            raise StructureError(
                f"{path}: adapters differ in {field.name}: {sorted(map(str, values))}"
            )


def _padded(arrays: Params | None, own: Entry | None, entry: Entry) -> Params:
    """An adapter's arrays in the shapes of the common entry."""
    shapes = {name: shape for name, shape, _ in (*entry.train, *entry.frozen)}
    if arrays is None:
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}
    if not set(arrays) >= {name for name, _, _ in own.frozen}:
        raise StructureError(f"{entry.path}: frozen arrays were folded into the base")
    factor = own.adapter.scale / entry.adapter.scale
    folded = {"b", "b0", "bias"} if factor != 1.0 else set()
    out = {}
    for name, shape in shapes.items():
        array = arrays.get(name, jnp.zeros(shape))
        array = array * jnp.asarray(factor, array.dtype) if name in folded else array
        out[name] = _fill(array, shape)
    return out


def _fill(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(array, [(0, n - m) for m, n in zip(array.shape, shape)])
