"""What the quantum cells share: their leaves, uniform starts and linear layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.paths import unflatten


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A leaf's shape and the interval its start is drawn from."""

    shape: tuple[int, ...]
    low: float
    high: float

    def __call__(self, key: jax.Array, shape: Any = None, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, self.shape, dtype, self.low, self.high)


def linear(inputs: int, outputs: int) -> dict[str, Uniform]:
    """Kernel and bias from ``U(-1/sqrt(in), 1/sqrt(in))``, the default of torch.nn.Linear."""
    bound = 1 / math.sqrt(inputs)
    shapes = {"kernel": (inputs, outputs), "bias": (outputs,)}
    return {name: Uniform(shape, -bound, bound) for name, shape in shapes.items()}


def affine(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """``x W + b``; the kernel may have an adapter."""
    y = ops.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST)
    return y + ops.value(layer["bias"], y.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Base class of the quantum cells.

    Args:
      features: D, width of the inputs.
      outputs: O, width of the outputs.
    """

    features: int = 1
    outputs: int = 1

    frozen: ClassVar[tuple[str, ...]] = ()  # first parts of the paths of leaves that never train

    def leaves(self) -> dict[str, Uniform]:
        """``{path: Uniform}`` of every leaf, in the order that :meth:`init` draws them."""
        raise NotImplementedError

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Fresh parameters, a tree."""
        keys = jax.random.split(key, len(self.leaves()))
        draw = zip(keys, self.leaves().items())
        return unflatten({path: leaf(key, dtype=dtype) for key, (path, leaf) in draw})

    def init_state(self, batch: int, dtype: Any = jnp.float32) -> jax.Array:
        """The state before the first token, ``[batch, ...]``."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Numbers in the parameters."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves().values())

    def hold(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with gradients stopped at the frozen leaves."""
        stop = jax.lax.stop_gradient
        held = {name: jax.tree.map(stop, params[name]) for name in self.frozen}
        return {**params, **held}

    def _start(self, x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs in at least float32, and the state, which is new unless given.

        Raises:
          StructureError: inputs of another width.
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise StructureError(f"input {x.shape} is not [batch, time, features={self.features}]")
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x, self.init_state(len(x), x.dtype) if state is None else state


def positive(cell: Any, *names: str) -> None:
    """Raises ConfigError unless the fields are at least 1."""
    for name in names:
        if getattr(cell, name) < 1:
            kind = type(cell).__name__
            raise ConfigError(f"{kind}.{name}={getattr(cell, name)} must be at least 1")
