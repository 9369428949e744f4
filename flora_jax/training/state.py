"""The training state: everything that changes, and nothing that does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import initialize
from flora_jax.core.adapter import PRNG
from flora_jax.core.initialize import combine, partition
from flora_jax.core.leaf import is_leaf
from flora_jax.core.plan import Plan
from flora_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; the frozen base model is not in it.

    Args:
      step: finished optimizer steps, int32 scalar.
      train: trained adapter arrays ``{path: {name: array}}``.
      frozen: the adapters' frozen arrays, same layout.
      opt_state: the optax state over ``train``.
      rng: typed PRNG key; never changes, each step folds its number in.
    """

    step: jax.Array
    train: Any
    frozen: Any
    opt_state: Any
    rng: jax.Array

    @property
    def done(self) -> int:
        """Finished steps, on the host; of the furthest one of stacked members."""
        return int(self.step if self.step.ndim == 0 else jnp.max(self.step))

    @property
    def adapters(self) -> Any:
        """``{path: {name: array}}`` with the frozen arrays."""
        return combine(self.train, self.frozen)


def create_state(plan: Plan, adapters: Any, optimizer: Any, rng: jax.Array | int = 0) -> TrainState:
    """Step 0 for freshly initialised (or loaded) adapters.

    Args:
      optimizer: an optimizer dataclass, :class:`Groups` or an optax transform.
      rng: a typed key, or a seed.

    Raises:
      StructureError: adapters and plan differ.
      RuleError: an array belongs to no optimizer group.
    """
    train, frozen = partition(adapters, plan)
    if isinstance(rng, int):
        rng = jax.random.key(rng, impl=PRNG)
    opt_state = jax.jit(optim.build(optimizer, train).init)(train)
    return TrainState(jnp.zeros((), jnp.int32), train, frozen, opt_state, rng)


def fresh_state(
    plan: Plan, base: Any, optimizer: Any, seed: int, adapters: Any = None
) -> TrainState:
    """Step 0 of a run: adapters from ``seed``, or copies of given ones, and its key."""
    key = jax.random.key(seed, impl=PRNG)
    if adapters is None:
        adapters = initialize.init(plan, jax.random.fold_in(key, 0), base)
    adapters = jax.tree.map(jnp.copy, adapters)  # the caller's arrays survive donation
    return create_state(plan, adapters, optimizer, jax.random.fold_in(key, 1))


def cast_base(params: Any, dtype: Any) -> Any:
    """Floating plain arrays of the base as ``dtype`` (bfloat16: half the memory and traffic).

    Low-bit and other weight leaves stay as they are; adapters stay float32 in the state and are
    cast to the activation's dtype where they multiply.
    """

    def one(leaf: Any) -> Any:
        if is_leaf(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(dtype)

    return jax.tree.map(one, params, is_leaf=is_leaf)
