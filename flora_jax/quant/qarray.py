"""QArray: a low-bit weight as a pytree leaf that any contraction takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.contraction import Contraction, mm
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.core.spec import KernelSpec, infer
from flora_jax.quant.formats import Format, _blocks, _flat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray(WeightLeaf):
    """Packed codes, scales and zero points of one weight.

    ``scale`` has the rank of the weight and divides each axis: its quantised axis has one entry per
    block. ``axis`` is negative (counted from the end), so a scanned stack slices like an array.

    Args:
      values: int8 codes, or int4 codes packed two a byte along ``axis``.
      scale: float32.
      zero: int8, or None when symmetric.
      fmt: the format.
      axis: the quantised axis.
      logical: dtype name that the weight had and :func:`dequantize` gives back.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    fmt: Format = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    logical: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        shape = list(self.values.shape)
        shape[self.axis] *= self.fmt.packing
        return tuple(shape)

    @property
    def dtype(self):
        return jnp.dtype(self.logical)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        arrays = (self.values, self.scale, self.zero)
        return sum(a.size * a.dtype.itemsize for a in arrays if a is not None)

    @property
    def block(self) -> int:
        """Weights per scale along ``axis``."""
        return self.shape[self.axis] // self.scale.shape[self.axis]

    def codes(self) -> jax.Array:
        """Unpacked int8 codes."""
        return self.fmt.unpack(self.values, self.block, self.axis)

    def dense(self, dtype=None):
        wide = jnp.promote_types(dtype or self.dtype, jnp.float32)
        parts = _blocks(self.codes(), self.block, self.axis).astype(wide)
        at = parts.ndim + self.axis
        if self.zero is not None:
            parts = parts - jnp.expand_dims(self.zero.astype(wide), at)
        parts = parts * jnp.expand_dims(self.scale.astype(wide), at)
        return _flat(parts, self.axis).astype(dtype or self.dtype)

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else self.dtype
        return how.base(x, self.dense(dtype))

    def attend(self, x, precision=None):
        return mm(x, self.dense(x.dtype).T, precision)

    def like(self, weight: jax.Array) -> QArray:
        """Another weight in the same format (a lossy requantisation)."""
        return quantize_array(weight, self.fmt, self.axis)


def quantize_array(weight: jax.Array, fmt: Format, axis: int) -> QArray:
    """Round a weight to the nearest code of its block.

    Symmetric: ``scale = max|w| / top``; else ``scale = (max - min) / (2^bits - 1)`` and
    ``zero = round(-min / scale) - 2^(bits-1)``, the range stretched to include 0.

    Raises:
      PlanError: the block does not divide the axis.
    """
    axis = axis - weight.ndim if axis >= 0 else axis
    n = weight.shape[axis]
    block = fmt.block or n
    if n % block or (fmt.bits == 4 and block % 2):
        raise PlanError(f"{fmt.name} blocks of {block} do not divide axis {axis} of {weight.shape}")
    parts = _blocks(weight.astype(jnp.float32), block, axis)
    if fmt.symmetric:
        scale = jnp.max(jnp.abs(parts), axis=axis, keepdims=True) / fmt.top
        zero = None
        low = -fmt.top
    else:
        smallest = jnp.minimum(parts.min(axis=axis, keepdims=True), 0.0)
        largest = jnp.maximum(parts.max(axis=axis, keepdims=True), 0.0)
        scale = (largest - smallest) / (2**fmt.bits - 1)
        low = -fmt.top - 1
        zero = jnp.round(-smallest / jnp.where(scale == 0, 1.0, scale)) + low
    codes = jnp.round(parts / jnp.where(scale == 0, 1.0, scale))
    codes = jnp.clip(codes if zero is None else codes + zero, low, fmt.top)
    values = fmt.pack(_flat(codes, axis), block, axis)
    squeeze = lambda a: None if a is None else jnp.squeeze(a, axis)
    zero = None if zero is None else squeeze(zero).astype(jnp.int8)
    return QArray(values, squeeze(scale), zero, fmt, axis, str(weight.dtype))


def quantized_axis(spec: KernelSpec) -> int:
    """The axis that blocks run along: the last input axis; the features of an embedding."""
    axis = spec.out_axes[-1] if spec.kind == "embedding" else spec.in_axes[-1]
    return axis - spec.ndim


def quantize(
    params: Any,
    rules: Mapping[str, Format | None] | Sequence[tuple[str, Format | None]],
    *,
    specs: Mapping[str, KernelSpec] | Sequence[tuple[str, KernelSpec]] = (),
) -> Any:
    """``params`` with the weights that a rule matches as :class:`QArray` leaves.

    Raises:
      RuleError: a rule matches nothing.
      PlanError: a block does not divide its axis, or the leaf is not a contracted weight.

    >>> q = quantize({"kernel": jnp.ones((8, 4))}, {".*": Format("int4", block=8)})
    >>> q["kernel"].shape, q["kernel"].values.shape
    ((8, 4), (4, 4))
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    given = paths.Rules.of(specs).match(leaves)
    chosen = paths.Rules.of(rules).match(leaves)

    def one(path: str, leaf: Any) -> Any:
        fmt = chosen.get(path)
        if fmt is None:
            return leaf
        spec = given.get(path) or infer(path, tuple(leaf.shape))
        if isinstance(leaf, WeightLeaf) or spec.kind in ("vector", "other"):
            raise PlanError(f"{path}: a {type(leaf).__name__} of kind {spec.kind} is not quantised")
        try:
            return quantize_array(leaf, fmt, quantized_axis(spec))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    return paths.map_with_path(one, params, is_leaf=is_leaf)


def dequantize(params: Any) -> Any:
    """``params`` with every QArray as a plain array."""
    plain = lambda leaf: leaf.dense() if isinstance(leaf, QArray) else leaf
    return jax.tree.map(plain, params, is_leaf=is_leaf)
