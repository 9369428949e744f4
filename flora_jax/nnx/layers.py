"""NNX layers that go through our dispatch when their kernel is a weight leaf.

Each is Flax's class with ``__call__`` overridden: same attributes, same parameters, Flax's own code
for plain kernels. :func:`flora_jax.nnx.adapt` swaps a model's layers to these.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flora_jax.core.errors import LazyError
from flora_jax.core.leaf import WeightLeaf
from flora_jax.linen import foreign


def _leaf(variable: nnx.Variable) -> WeightLeaf | None:
    """The weight leaf a Param holds, or None when it holds an array."""
    value = variable.get_raw_value()
    return value if isinstance(value, WeightLeaf) else None


def _bias(layer: Any) -> Any:
    return None if layer.bias is None else layer.bias[...]


def _numerics(layer: Any) -> foreign.Numerics:
    promote = lambda *arrays: layer.promote_dtype(arrays, dtype=layer.dtype)
    preferred = getattr(layer, "preferred_element_type", None)
    return foreign.Numerics(promote, getattr(layer, "precision", None), preferred)


def _hook(name: str, value: Any, default: Any) -> None:
    """Raise LazyError when a layer's injected operation is not the default one."""
    if value is not None and value is not default:
        foreign.refuse(**{name: value})


class Linear(nnx.Linear):
    """``nnx.Linear`` for any weight."""

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        kernel = _leaf(self.kernel)
        if kernel is None:
            return super().__call__(inputs, out_sharding)
        foreign.refuse(out_sharding=out_sharding)
        _hook("dot_general", self.dot_general, lax.dot_general)
        features = (self.out_features,)
        return foreign.dense_general(
            inputs, kernel, _bias(self), _numerics(self), features=features
        )


class LinearGeneral(nnx.LinearGeneral):
    """``nnx.LinearGeneral`` for any weight."""

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        kernel = _leaf(self.kernel)
        if kernel is None:
            return super().__call__(inputs, out_sharding)
        foreign.refuse(out_sharding=out_sharding, dot_general_cls=self.dot_general_cls)
        _hook("dot_general", self.dot_general, lax.dot_general)
        return foreign.dense_general(
            inputs,
            kernel,
            _bias(self),
            _numerics(self),
            features=self.out_features,
            axis=self.axis,
            batch=len(self.batch_axis),
        )


class Einsum(nnx.Einsum):
    """``nnx.Einsum`` for any weight."""

    def __call__(
        self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        kernel = _leaf(self.kernel)
        if kernel is None:
            return super().__call__(inputs, einsum_str, out_sharding)
        foreign.refuse(out_sharding=out_sharding)
        _hook("einsum_op", self.einsum_op, jnp.einsum)
        equation = einsum_str or self.einsum_str
        return foreign.einsum(inputs, kernel, _bias(self), _numerics(self), equation=equation)


class Conv(nnx.Conv):
    """``nnx.Conv`` for any weight."""

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        kernel = _leaf(self.kernel)
        if kernel is None:
            return super().__call__(inputs, out_sharding)
        foreign.refuse(out_sharding=out_sharding, mask=self.mask)
        _hook("conv_general_dilated", self.conv_general_dilated, lax.conv_general_dilated)
        return foreign.conv(
            inputs,
            kernel,
            _bias(self),
            _numerics(self),
            features=self.out_features,
            size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            groups=self.feature_group_count,
        )


class ConvTranspose(nnx.ConvTranspose):
    """``nnx.ConvTranspose`` for any weight; not ``transpose_kernel``."""

    def __call__(self, inputs: Any) -> jax.Array:
        kernel = _leaf(self.kernel)
        if kernel is None:
            return super().__call__(inputs)
        foreign.refuse(mask=self.mask, transpose_kernel=self.transpose_kernel)
        return foreign.conv_transpose(
            inputs,
            kernel,
            _bias(self),
            _numerics(self),
            features=self.out_features,
            size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
        )


class Embed(nnx.Embed):
    """``nnx.Embed`` for any weight, lookup and ``attend``."""

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        table = _leaf(self.embedding)
        if table is None:
            return super().__call__(inputs, out_sharding)
        foreign.refuse(out_sharding=out_sharding)
        scalar = (jnp.zeros((), table.dtype),)
        (scalar,) = self.promote_dtype(scalar, dtype=self.dtype, inexact=False)
        return foreign.embed(inputs, table, scalar.dtype)

    def attend(self, query: Any, out_sharding: Any = None) -> jax.Array:
        table = _leaf(self.embedding)
        if table is None:
            return super().attend(query, out_sharding)
        foreign.refuse(out_sharding=out_sharding)
        promote = lambda q, t, _: (*self.promote_dtype((q, t), dtype=self.dtype), _)
        return foreign.embed_attend(query, table, foreign.Numerics(promote))


LAYERS: tuple[type[nnx.Module], ...] = (Linear, LinearGeneral, Einsum, Conv, ConvTranspose, Embed)
_swapped: dict[type, type] = {layer.__bases__[0]: layer for layer in LAYERS}


def dispatching(cls: type) -> type | None:
    """The class to swap a layer's class to; None for anything that is not a Flax layer.

    A user's subclass of a Flax layer gets a class that derives from both, so that its own methods
    come first and their ``super()`` calls reach the dispatch.
    """
    if issubclass(cls, LAYERS):
        return cls
    if cls not in _swapped:
        ours = [layer for layer in LAYERS if issubclass(cls, layer.__bases__[0])]
        if not ours:
            return None
        if len(ours) > 1:
            raise LazyError(f"{cls.__name__} derives from {len(ours)} Flax layers; adapt one")
        _swapped[cls] = type(cls.__name__, (cls, ours[0]), {"__module__": cls.__module__})
    return _swapped[cls]
