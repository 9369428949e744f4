"""Low-bit weights as the kernels read them, and the pure functions that pack and unpack them.

int4, split halves: in each tile of ``tile`` rows, byte row r holds the code of row r (low nibble)
and of row r + tile/2 (high). Unpacking is two shifts a byte and moves nothing: the low nibbles meet
one contiguous slice of x, the high ones another, and columns stay contiguous.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Contraction, Dot, mm
from flora_jax.core.errors import PlanError, unknown
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.quant.formats import Format
from flora_jax.quant.qarray import QArray, quantize_array

BITS = {"int4": 4, "int8": 8, "float8_e4m3fn": 8}
ROWS = ("int8", "float8_e4m3fn")
"""What the rows of x are quantised to."""
LAYOUT = "split-half/1"
TILES = (1024, 512, 256)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowBit(WeightLeaf):
    """A weight ``w[k, n] = (q[k, n] - zero[g, n]) scale[g, n]``, g the group of row k.

    Leading axes (layers, experts) are allowed everywhere; a product takes one weight. As a leaf of
    ``params`` it multiplies through ``low_bit_matmul``.

    Args:
      values: ``[K/2, N]`` int8 (int4, two codes a byte), ``[K, N]`` int8 or float8_e4m3fn.
      scale: float32 ``[G, N]``; G = 1 is a scale per channel; ``[1, 1]`` per tensor.
      zero: int8 ``[G, N]``, or None: symmetric. Not for float8.
      format: ``int4``, ``int8`` or ``float8_e4m3fn``.
      tile: rows of a packing tile (int4); None otherwise.
      logical: dtype name of the weight that it stands for.
      layout: version of the packing.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    format: str = dataclasses.field(metadata={"static": True})
    tile: int | None = dataclasses.field(default=None, metadata={"static": True})
    logical: str = dataclasses.field(default="float32", metadata={"static": True})
    layout: str = dataclasses.field(default=LAYOUT, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, n = self.values.shape
        return (*lead, rows * (8 // BITS[self.format]), n)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.logical)

    @property
    def groups(self) -> int:
        return self.scale.shape[-2]

    @property
    def group(self) -> int:
        """Rows per scale."""
        return self.shape[-2] // self.groups

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    def codes(self) -> jax.Array:
        """``[K, N]``: int8, or float8 as stored."""
        return unpack(self.values, self.tile) if self.format == "int4" else self.values

    def dense(self, dtype: Any = None) -> jax.Array:
        """``[K, N]``, computed in float32 and rounded once."""
        *lead, k, n = self.shape
        parts = self.codes().astype(jnp.float32).reshape(*lead, self.groups, self.group, n)
        if self.zero is not None:
            parts = parts - self.zero.astype(jnp.float32)[..., None, :]
        dense = (parts * self.scale[..., None, :]).reshape(*lead, k, n)
        return dense.astype(dtype or self.dtype)

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        plain = isinstance(how, Dot) and len(how.shape) == 2 and how.precision is None
        if floating and plain and how.spec.in_axes == (0,):
            # The product imports this module.
            from flora_jax.kernels.low_bit_matmul.api import low_bit_matmul

            return low_bit_matmul(x, self)
        return how.base(x, self.dense(x.dtype if floating else None))

    def attend(self, x: jax.Array, precision: Any = None) -> jax.Array:
        return mm(x, self.dense(x.dtype).T, precision)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Quantised rows ``x[m, k] = (q[m, k] - zero[m]) scale[m]``.

    Args:
      values: int8 or float8_e4m3fn ``[..., K]``.
      scale: float32 ``[..., 1]``, one a row; any shape that broadcasts to it.
      zero: int8 like ``scale``, or None: symmetric. int8 only.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def tile_for(k: int, group: int) -> int:
    """Rows of a packing tile: the largest of 1024, 512, 256 that fits, else the group or all of K.

    Raises:
      PlanError: no tile fits: K is odd.
    """
    for tile in (*TILES, group, k):
        if k % tile == 0 and _fits(tile, group):
            return tile
    raise PlanError(f"int4 packs two rows a byte: {k} rows in groups of {group} cannot be halved")


def _fits(tile: int, group: int) -> bool:
    """A half tile is whole groups, or lies within one."""
    half = tile // 2
    return tile % 2 == 0 and (half % group == 0 or group % half == 0)


def pack(codes: jax.Array, tile: int) -> jax.Array:
    """int4 codes ``[..., K, N]`` to bytes ``[..., K/2, N]``; the inverse of :func:`unpack`.

    >>> pack(jnp.array([[1], [2], [-1], [-8]]), 4).tolist()
    [[-15], [-126]]

    Raises:
      PlanError: the tile is odd or does not divide K.
    """
    *lead, k, n = codes.shape
    if tile % 2 or k % tile:
        raise PlanError(f"int4 tiles of {tile} rows do not pack {k} rows: even divisors do")
    halves = codes.astype(jnp.int8).reshape(*lead, k // tile, 2, tile // 2, n)
    low, high = halves[..., 0, :, :], halves[..., 1, :, :]
    return ((low & 0x0F) | (high << 4)).reshape(*lead, k // 2, n)


def unpack(values: jax.Array, tile: int) -> jax.Array:
    """Bytes ``[..., K/2, N]`` to int8 codes ``[..., K, N]``."""
    *lead, half, n = values.shape
    parts = values.reshape(*lead, 2 * half // tile, 1, tile // 2, n)
    both = jnp.concatenate([(parts << 4) >> 4, parts >> 4], axis=-3)
    return both.reshape(*lead, 2 * half, n)


def low_bit(
    values: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    format: str,
    tile: int | None = None,
    logical: str = "float32",
) -> LowBit:
    """A weight from its codes ``[..., K, N]``, unpacked, and the scales of its groups.

    Raises:
      PlanError: groups or tile do not divide the rows, or a zero point for float8.
    """
    k = values.shape[-2]
    if format not in BITS:
        raise PlanError(unknown("format", format, BITS))
    if k % scale.shape[-2]:
        raise PlanError(f"{scale.shape[-2]} groups do not divide {k} rows")
    if zero is not None and format == "float8_e4m3fn":
        raise PlanError("float8 weights have no zero point")
    scale = jnp.asarray(scale, jnp.float32)
    if format != "int4":
        values = values.astype(format)
        return LowBit(values=values, scale=scale, zero=zero, format=format, logical=logical)
    group = k // scale.shape[-2]
    tile = tile or tile_for(k, group)
    if k % tile or not _fits(tile, group):
        raise PlanError(f"tile={tile} fits neither {k} rows nor their groups of {group}")
    values = pack(values, tile)
    given = {"format": format, "tile": tile, "logical": logical}
    return LowBit(values=values, scale=scale, zero=zero, **given)


def quantize(
    weight: jax.Array,
    format: str = "int4",
    *,
    group: int | str | None = None,
    symmetric: bool = True,
    tile: int | None = None,
) -> LowBit:
    """Rounds ``[..., K, N]`` to the nearest code.

    Args:
      format: ``int4``, ``int8`` or ``float8_e4m3fn``.
      group: rows per scale; None: one scale per column; ``"tensor"``: one in all, symmetric only.
      symmetric: no zero point.
      tile: of int4; default :func:`tile_for`.

    >>> w = quantize(jnp.ones((256, 4)), "int4", group=64)
    >>> w.values.shape, w.scale.shape
    ((128, 4), (4, 4))

    Raises:
      PlanError: unknown format, a group that does not divide K, or one that has no such scales.
    """
    if format not in BITS:
        raise PlanError(unknown("format", format, BITS))
    if (group == "tensor" or format == "float8_e4m3fn") and not symmetric:
        raise PlanError(f"{format} with group={group!r} is symmetric only")
    if group == "tensor" or format == "float8_e4m3fn":
        top = 448.0 if format == "float8_e4m3fn" else 2.0 ** (BITS[format] - 1) - 1
        return _scaled(weight, format, group, top, tile)
    q = quantize_array(weight, Format(format, block=group, symmetric=symmetric), -2)
    return from_qarray(q, tile=tile)


def _scaled(weight: jax.Array, format: str, group: Any, top: float, tile: int | None) -> LowBit:
    *lead, k, n = weight.shape
    size = k if group in (None, "tensor") else group
    if k % size:
        raise PlanError(f"groups of {size} do not divide {k} rows")
    parts = weight.astype(jnp.float32).reshape(*lead, k // size, size, n)
    axes = (-2, -1) if group == "tensor" else (-2,)
    scale = jnp.max(jnp.abs(parts), axis=axes, keepdims=True) / top
    codes = parts / jnp.where(scale == 0, 1.0, scale)
    codes = codes if format == "float8_e4m3fn" else jnp.clip(jnp.round(codes), -top, top)
    given = {"format": format, "tile": tile, "logical": str(weight.dtype)}
    return low_bit(codes.reshape(*lead, k, n), scale[..., 0, :], **given)


def from_qarray(weight: QArray, *, tile: int | None = None) -> LowBit:
    """A :class:`~flora_jax.quant.QArray` ``[..., K, N]`` quantised along K, as the kernels read it.

    ``tile=weight.block`` keeps its bytes as they are; the default repacks them into larger tiles,
    which let a kernel take larger steps.

    Raises:
      PlanError: quantised along another axis, or an odd group.
    """
    if weight.axis != -2:
        raise PlanError(f"quantised along axis {weight.axis}, not along the rows (-2)")
    given = {"format": weight.fmt.name, "tile": tile, "logical": weight.logical}
    if given["format"] == "int4" and tile == weight.block:
        return LowBit(values=weight.values, scale=weight.scale, zero=weight.zero, **given)
    return low_bit(weight.codes(), weight.scale, weight.zero, **given)


def from_qarrays(params: Any) -> Any:
    """``params`` with every QArray quantised along its rows (axis -2) as a :class:`LowBit`.

    To be done once, after loading. Files hold QArrays.
    """
    fits = lambda leaf: isinstance(leaf, QArray) and leaf.axis == -2
    convert = lambda leaf: from_qarray(leaf) if fits(leaf) else leaf
    return jax.tree.map(convert, params, is_leaf=is_leaf)


def quantize_rows(x: jax.Array, format: str = "int8") -> Rows:
    """Each row by its largest magnitude, to the nearest code: int8 or float8_e4m3fn.

    Raises:
      PlanError: unknown format.
    """
    if format not in ROWS:
        raise PlanError(unknown("format of rows", format, ROWS))
    x = x.astype(jnp.float32)
    top = 448.0 if format == "float8_e4m3fn" else 127.0
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / top
    codes = x / jnp.where(scale == 0, 1.0, scale)
    codes = codes if format == "float8_e4m3fn" else jnp.round(codes)
    return Rows(values=codes.astype(format), scale=scale)


def row_unit(w: LowBit) -> int:
    """Slices of the rows at multiples of this have whole tiles, and whole groups or one group."""
    tile = w.tile or 1
    if w.groups == 1 or w.group % tile == 0:
        return tile
    return math.lcm(tile, w.group)


def take_rows(w: LowBit, start: jax.Array | int, size: int) -> LowBit:
    """Rows ``start .. start + size`` of ``[K, N]``; both are multiples of :func:`row_unit`."""
    share = 8 // BITS[w.format]
    piece = lambda a, at, count: jax.lax.dynamic_slice_in_dim(a, at, count, axis=-2)
    groups = max(1, size // w.group)
    scales = lambda a: None if a is None else piece(a, start // w.group, groups)
    return dataclasses.replace(
        w,
        values=piece(w.values, start // share, size // share),
        scale=scales(w.scale),
        zero=scales(w.zero),
    )


def take_columns(w: LowBit, start: jax.Array | int, size: int) -> LowBit:
    """Columns ``start .. start + size`` of ``[K, N]``."""
    piece = lambda a: (
        a if a is None or a.shape[-1] == 1 else jax.lax.dynamic_slice_in_dim(a, start, size, -1)
    )
    return dataclasses.replace(w, values=piece(w.values), scale=piece(w.scale), zero=piece(w.zero))
