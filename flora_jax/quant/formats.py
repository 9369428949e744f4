"""Integer block formats: levels, packing and unpacking."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.core.errors import PlanError, unknown

BITS = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Format:
    """``w = (q - zero) * scale`` with integer codes q and one scale per block.

    Args:
      name: ``int8`` or ``int4`` (two codes a byte).
      block: weights per scale along the quantised axis; None is the whole axis.
      symmetric: no zero point; codes in ``-(2^(bits-1) - 1) .. 2^(bits-1) - 1``. Else codes use
        all ``2^bits`` levels between the block's minimum and maximum.

    >>> Format("int4", block=64).bits
    4
    """

    name: str
    block: int | None = None
    symmetric: bool = True

    def __post_init__(self):
        if self.name not in BITS:
            raise PlanError(unknown("format", self.name, BITS))
        if self.block is not None and (self.block < 2 or (self.bits == 4 and self.block % 2)):
            raise PlanError(f"block={self.block}: at least 2, and even for int4")

    @property
    def bits(self) -> int:
        return BITS[self.name]

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def packing(self) -> int:
        """Codes per byte."""
        return 8 // self.bits

    def pack(self, codes: jax.Array, block: int, axis: int) -> jax.Array:
        """Integer codes to stored bytes along ``axis``.

        int4: within each block, byte i holds code i (low nibble) and code i + block/2 (high):
        split halves unpack without shuffles in a kernel.
        """
        if self.bits == 8:
            return codes.astype(jnp.int8)
        parts = _blocks(codes.astype(jnp.int8), block, axis)
        low, high = jnp.split(parts, 2, axis=axis)
        return _flat((low & 0x0F) | (high << 4), axis)

    def unpack(self, stored: jax.Array, block: int, axis: int) -> jax.Array:
        """Stored bytes to int8 codes along ``axis``; the inverse of :meth:`pack`."""
        if self.bits == 8:
            return stored
        parts = _blocks(stored, block // 2, axis)
        low, high = (parts << 4) >> 4, parts >> 4
        return _flat(jnp.concatenate([low, high], axis=axis), axis)


def _blocks(x: jax.Array, block: int, axis: int) -> jax.Array:
    """``[..., n, ...] -> [..., n / block, block, ...]``; negative ``axis`` is then the block's."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // block, block, *x.shape[at + 1 :])


def _flat(x: jax.Array, axis: int) -> jax.Array:
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], x.shape[at - 1] * x.shape[at], *x.shape[at + 1 :])
