"""A weight is a value: the protocol of leaves that are not plain arrays.

A leaf of ``params`` is an array or a :class:`WeightLeaf`: a registered pytree that knows how it
is contracted. ``QArray`` (low-bit), ``Adapted`` (base and adapter) and ``Observed`` (statistics)
are the weight leaves; everything that multiplies by a weight goes through ``core/ops.py``, which
hands the contraction to the leaf.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Contraction, mm

_CURE = (
    "the layer does not go through flora_jax's dispatch. Use flora_jax.linen layers, wrap the call "
    "in flora_jax.linen.intercept(), adapt an NNX model with flora_jax.nnx.adapt(), or "
    "flora_jax.materialize() the parameters"
)


class WeightLeaf(abc.ABC):
    """A value that stands where a kernel array stood."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The logical shape: that of the kernel it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The logical dtype."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @abc.abstractmethod
    def contract(self, how: Contraction, x: Any) -> jax.Array:
        """The layer's output (in its own layout) for input ``x``."""

    @abc.abstractmethod
    def attend(self, x: jax.Array, precision: Any = None) -> jax.Array:
        """``x [..., out] @ W.T`` for an embedding table ``W [in, out]`` (tied heads)."""

    def prefix(self) -> tuple[Weight, Prefix | None]:
        """The weight without its attention prefix, and the prefix: see ``ops.prefix``."""
        return self, None

    def prefix_tokens(self) -> Any:
        """Length of its prefix, or ``[N]`` for rows that differ; None without one."""
        return None

    def virtual_rows(self) -> tuple[int, Any] | None:
        """``(P, on)``: rows past the end of an embedding table, ``on [N]`` for rows that differ."""
        return None

    @abc.abstractmethod
    def dense(self, dtype: Any = None) -> jax.Array:
        """The whole kernel as one array. Explicit, never called by a contraction with dW."""

    def __jax_array__(self):
        kind = type(self).__name__
        raise TypeError(f"a weight ({kind}, shape {self.shape}) was used as a plain array: {_CURE}")

    def __getitem__(self, index):
        return self.__jax_array__()

    def __getattr__(self, name: str):
        # Array attributes (``.T``, ``.astype``) and operators looked up by name end here. No shape
        # in the text: the leaf may be half built.
        raise AttributeError(
            f"a weight ({type(self).__name__}) was used as a plain array ({name!r}): {_CURE}"
        )


Weight = jax.Array | WeightLeaf


class Prefix(NamedTuple):
    """Entries that stand before an attention's own keys or values.

    Args:
      values: ``[1, P, out]``, or ``[N, P, out]`` for the rows of a batch.
      on: ``[N, P]``, which entries a row has; None for all of them.
    """

    values: jax.Array
    on: jax.Array | None


def is_leaf(node: Any) -> bool:
    """Stop at weight leaves when walking ``params``."""
    return isinstance(node, WeightLeaf)


def contract(how: Contraction, x: Any, w: Weight) -> jax.Array:
    """The layer's contraction of ``x`` with any weight."""
    return w.contract(how, x) if isinstance(w, WeightLeaf) else how.base(x, w)


def attend(x: jax.Array, w: Weight, precision: Any = None) -> jax.Array:
    """``x [..., out] @ w.T`` with any weight ``w [in, out]``."""
    if isinstance(w, WeightLeaf):
        return w.attend(x, precision)
    return mm(x, w.T, precision)


def dense(w: Weight, dtype: Any = None) -> jax.Array:
    """Any weight as one plain array."""
    if isinstance(w, WeightLeaf):
        return w.dense(dtype)
    return w if dtype is None else jnp.asarray(w, dtype)
