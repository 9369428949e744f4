"""Where a run's arrays live: host arrays to the devices of a mesh, on one process or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError
from flora_jax.core.plan import Plan
from flora_jax.training import distributed, sharding
from flora_jax.training.state import TrainState


def place(tree: Any, shardings: Any) -> Any:
    """``tree`` with each array laid out as its sharding says.

    With several processes every one passes the same whole arrays (or arrays that already are
    global, which are only re-laid).
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_global, tree, shardings)


def _place_global(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _place_global(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things live; without a mesh everything stays on the default device."""

    mesh: Any
    state: Any
    base: Any
    batch: Any
    abstract: TrainState

    @classmethod
    def of(
        cls, plan: Plan, base: Any, fresh: Callable, mesh: Any, rules: Any, members: Any = None
    ) -> Layout:
        abstract = jax.eval_shape(fresh)
        if mesh is None and jax.process_count() > 1:
            raise ConfigError(f"{jax.process_count()} processes need a mesh, e.g. data=-1")
        if mesh is None:
            # said outright, so that a checkpoint of a larger mesh restores on one device
            here = jnp.zeros(()).sharding
            one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
            return cls(None, None, None, None, jax.tree.map(one, abstract))
        specs = sharding.base_specs(base, mesh, rules)
        if members is None:
            state = sharding.state_shardings(abstract, plan, specs, mesh)
        else:
            if members.batches == "own":
                raise ConfigError("Members.batches='own' has no layout on a mesh; use 'shared'")
            state = sharding.members_shardings(abstract, plan, specs, mesh)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state
        )
        whole = sharding.base_shardings(base, mesh, rules)
        return cls(mesh, state, whole, sharding.batch_sharding(mesh), abstract)

    def place_base(self, base: Any) -> Any:
        return base if self.mesh is None else place(base, self.base)

    def place_state(self, state: TrainState) -> TrainState:
        return state if self.mesh is None else place(state, self.state)

    def place_batch(self, batch: Any) -> Any:
        return batch if self.mesh is None else distributed.global_batch(batch, self.batch)
