"""Adapters in device arrays of fixed shapes: load, unload and mix them without recompiling."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import Params
from flora_jax.core.errors import ConfigError, PlanError, unknown
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.plan import Entry, Plan, check_adapters
from flora_jax.core.registry import name_of
from flora_jax.core.rows import Stacked


class AdapterBank:
    """``capacity`` slots for adapters of one plan, in common arrays ``[*stack, capacity, ...]``.

    The arrays are an argument of the compiled program and the rows of a batch are numbers: loading
    an adapter overwrites a slot in place (the old arrays are donated), and no new adapter, mixture
    or weight compiles anything. Beside ``bind(params, {name: tree}, plan, rows=)`` it saves
    stacking the adapters in every call. ``arrays`` is a pytree: differentiate it and put the
    trained one back, and each row's loss has trained its own adapter.

    Args:
      plan: of every adapter; :func:`flora_jax.pad_rank` makes LoRAs of several ranks fit one.
      capacity: K.

    Raises:
      PlanError: a method that has no form per row.

    >>> import flora_jax as flora
    >>> params = {"up": {"kernel": jnp.ones((6, 4))}}
    >>> plan = flora.plan(params, {".*/kernel": flora.LoRA(rank=2)})
    >>> bank = AdapterBank(plan, capacity=4)
    >>> bank.load("french", flora.init(plan, jax.random.key(0), params))
    >>> bank.rows(["french", None]).tolist()
    [0, -1]
    >>> bound = flora.bind(params, bank.arrays, plan, rows=bank.rows(["french", None]))
    """

    def __init__(self, plan: Plan, capacity: int):
        if capacity < 1:
            raise ConfigError(f"capacity={capacity} must be at least 1")
        for entry in plan:
            adapter = entry.adapter
            if adapter.whole_stack or adapter.per_example or entry.spec.kind in ("vector", "other"):
                raise PlanError(
                    f"{entry.path}: {name_of(adapter)} on a {entry.spec.kind} weight has no form "
                    "in which rows choose among adapters"
                )
        self.plan, self.capacity = plan, capacity
        self._depths = {owner.path: _depth(owner) for owner in plan.owners}
        self.arrays = Stacked(
            {
                owner.path: {
                    name: jnp.zeros(
                        (*shape[: _depth(owner)], capacity, *shape[_depth(owner) :]), dtype
                    )
                    for name, shape, dtype in (*owner.train, *owner.frozen)
                }
                for owner in plan.owners
            }
        )
        self._slots: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        return tuple(self._slots)

    def load(self, name: str, adapters: AdapterTree) -> None:
        """Put an adapter into a slot; one of the same name is overwritten.

        Raises:
          StructureError: it is not of the plan.
          ConfigError: every slot is taken.
        """
        check_adapters(adapters, self.plan)
        for path, arrays in self.arrays.arrays.items():
            missing = sorted(set(arrays) - set(adapters[path]))
            if missing:
                raise PlanError(f"{path}: {missing} were folded into the base; load the original")
        free = [n for n in range(self.capacity) if n not in self._slots.values()]
        if name not in self._slots and not free:
            raise ConfigError(
                f"all {self.capacity} slots are taken: unload one of {', '.join(self._slots)}"
            )
        slot = self._slots.setdefault(name, free[0] if free else -1)
        self.arrays = Stacked(
            {
                path: _put(arrays, adapters[path], slot, depth=self._depths[path])
                for path, arrays in self.arrays.arrays.items()
            }
        )

    def unload(self, name: str) -> None:
        """Free a slot; the arrays stay until another adapter takes it."""
        self.slot(name)
        del self._slots[name]

    def slot(self, name: str) -> int:
        """The number of a loaded adapter.

        Raises:
          ConfigError: no such adapter.
        """
        if name not in self._slots:
            raise ConfigError(unknown("adapter", name, self._slots))
        return self._slots[name]

    def rows(self, names: Sequence[str | None]) -> jax.Array:
        """``[N]`` int32 for ``flora.bind(rows=)``: slots by name, -1 for the base."""
        return jnp.array([-1 if name is None else self.slot(name) for name in names], jnp.int32)

    def get(self, name: str) -> AdapterTree:
        """A loaded adapter as a tree of its own, e.g. after training."""
        slot = self.slot(name)
        return {
            path: {n: jnp.take(a, slot, axis=self._depths[path]) for n, a in arrays.items()}
            for path, arrays in self.arrays.arrays.items()
        }


def _depth(owner: Any) -> int:
    """Stack axes before the slot's; a pool has none."""
    return len(owner.stack) if isinstance(owner, Entry) else 0


@functools.partial(jax.jit, static_argnames=("depth",), donate_argnames=("arrays",))
def _put(arrays: Params, new: Mapping[str, Any], slot: Any, depth: int) -> Params:
    at = (slice(None),) * depth
    return {name: a.at[(*at, slot)].set(new[name].astype(a.dtype)) for name, a in arrays.items()}
