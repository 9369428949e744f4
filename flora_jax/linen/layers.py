"""Linen layers whose kernel may be an array, a ``QArray``, an ``Adapted`` or an ``Observed`` leaf.

Parameter names and layouts are Flax's own (``kernel``, ``bias``, ``scale``, ``embedding``), so
trees are interchangeable with ``flax.linen`` models. Kernels are fetched with our own check:
Linen's ``self.param`` compares the declared shape with the first array inside a leaf, which a
packed low-bit leaf does not satisfy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core import ops
from flora_jax.core.errors import StructureError
from flora_jax.core.leaf import Prefix, Weight, WeightLeaf

Initializer = nn.initializers.Initializer


def weight(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], dtype: Any
) -> Weight:
    """The parameter ``name`` of a module, which may be a weight leaf of that logical shape.

    Raises:
      StructureError: the stored leaf stands for another shape.
    """
    if module.has_variable("params", name):
        leaf = module.get_variable("params", name)
        if isinstance(leaf, WeightLeaf):
            if tuple(leaf.shape) != tuple(shape):
                path = "/".join((*module.path, name))
                raise StructureError(f"{path}: stored shape {leaf.shape}, layer needs {shape}")
            return leaf
    return module.param(name, init, shape, dtype)


class Dense(nn.Module):
    """``y = x W + b`` with ``W [in, features]``.

    >>> layer = Dense(4)
    >>> params = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> layer.apply(params, jnp.ones((2, 3))).shape
    (2, 4)
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    precision: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        return self._product(x, weight(self, "kernel", self.kernel_init, shape, self.param_dtype))

    def _product(self, x: jax.Array, kernel: Weight) -> jax.Array:
        y = ops.dot(x.astype(self.dtype or x.dtype), kernel, precision=self.precision)
        if self.use_bias:
            bias = weight(self, "bias", self.bias_init, (self.features,), self.param_dtype)
            y = y + ops.value(bias, y.dtype)
        return y


class PrefixDense(Dense):
    """The key or value projection of an attention: also gives the prefix that its kernel has.

    ``x [..., in] -> (y [..., features], Prefix or None)``.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Prefix | None]:
        shape = (x.shape[-1], self.features)
        kernel = weight(self, "kernel", self.kernel_init, shape, self.param_dtype)
        kernel, prefix = ops.prefix(kernel)
        return self._product(x, kernel), prefix


class Einsum(nn.Module):
    """``y = einsum(equation, x, W) + b`` with a kernel of any rank, e.g. ``"BTD,DNH->BTNH"``."""

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    precision: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = weight(self, "kernel", self.kernel_init, self.shape, self.param_dtype)
        y = ops.einsum(
            self.equation, x.astype(self.dtype or x.dtype), kernel, precision=self.precision
        )
        if self.bias_shape is not None:
            zeros = nn.initializers.zeros_init()
            bias = weight(self, "bias", zeros, self.bias_shape, self.param_dtype)
            y = y + ops.value(bias, y.dtype)
        return y


class Conv(nn.Module):
    """Channels-last convolution, kernel ``[*window, in/groups, features]``."""

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1] // self.feature_group_count, self.features)
        kernel = weight(self, "kernel", self.kernel_init, shape, self.param_dtype)
        y = ops.conv(
            x.astype(self.dtype or x.dtype),
            kernel,
            strides=self.strides,
            padding=self.padding,
            groups=self.feature_group_count,
        )
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = weight(self, "bias", zeros, (self.features,), self.param_dtype)
            y = y + ops.value(bias, y.dtype)
        return y


class Embed(nn.Module):
    """Embedding table ``[num_embeddings, features]``; ``attend`` is the tied output head."""

    num_embeddings: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(0.02)

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = weight(self, "embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return ops.embed(ids, self.embedding, dtype=self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """``x [..., features] -> [..., num_embeddings]``."""
        return ops.attend(x, self.embedding)


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * scale``, computed in float32."""

    epsilon: float = 1e-6
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.initializers.ones_init()
        scale = weight(self, "scale", ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon
        )
        return (wide * ops.value(scale, wide.dtype)).astype(x.dtype)


class LayerNorm(nn.Module):
    """``y = (x - mean) / sqrt(var + eps) * scale + bias``, computed in float32."""

    epsilon: float = 1e-6
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = weight(self, "scale", ones, (x.shape[-1],), self.param_dtype)
        bias = weight(self, "bias", zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
        wide = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (wide * ops.value(scale, wide.dtype) + ops.value(bias, wide.dtype)).astype(x.dtype)
