"""Named shapes that tests, benchmarks and ahead-of-time compiles share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.low_bit_matmul.packing import LowBit, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """``x [m, k]`` bfloat16 times a weight ``[k, n]``.

    Args:
      format: of the weight.
      group: rows per scale; None: one scale per column.
      symmetric: no zero point.
      x_format: what rows are rounded to first.
    """

    m: int
    k: int
    n: int
    format: str
    group: int | None = None
    symmetric: bool = True
    x_format: str | None = None

    @property
    def name(self) -> str:
        """``w4a16 g128 M16 K4096 N14336``; ``z``: zero points, ``f8``: float8."""
        left = {"int4": "w4", "int8": "w8", "float8_e4m3fn": "wf8"}[self.format]
        right = {None: "a16", "int8": "a8", "float8_e4m3fn": "af8"}[self.x_format]
        group = f" g{self.group}" if self.group else ""
        zero = "" if self.symmetric else "z"
        return f"{left}{right}{group}{zero} M{self.m} K{self.k} N{self.n}"

    def x(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.m, self.k), jnp.bfloat16)

    def weight(self) -> LowBit:
        """The weight, abstract."""
        dense = jax.ShapeDtypeStruct((self.k, self.n), jnp.bfloat16)
        return jax.eval_shape(self._quantize, dense)

    def _quantize(self, dense: jax.Array) -> LowBit:
        return quantize(dense, self.format, group=self.group, symmetric=self.symmetric)

    def draw(self, key: jax.Array) -> tuple[jax.Array, LowBit]:
        """Random arguments."""
        left, right = jax.random.split(key)
        x = jax.random.normal(left, (self.m, self.k), jnp.bfloat16)
        w = jax.random.normal(right, (self.k, self.n), jnp.bfloat16)
        return x, jax.jit(self._quantize)(w)


GROUP = 128
KINDS: tuple[dict[str, Any], ...] = (
    {"format": "int4", "group": GROUP},
    {"format": "int4", "group": GROUP, "symmetric": False},
    {"format": "int8"},
    {"format": "float8_e4m3fn"},
    {"format": "int8", "x_format": "int8"},
    {"format": "float8_e4m3fn", "x_format": "float8_e4m3fn"},
    {"format": "int4", "group": GROUP, "x_format": "float8_e4m3fn"},
    {"format": "int4", "group": GROUP, "x_format": "int8"},
)
"""W4A16 without and with zero points, W8A16 of int8 and float8, W8A8 of both, W4A8 of both."""

ROWS = (1, 16, 64, 256)


def _specs(rows: tuple[int, ...], k: int, n: int, group: int = GROUP) -> tuple[Spec, ...]:
    kinds = [kind | {"group": group} if "group" in kind else kind for kind in KINDS]
    return tuple(Spec(m=m, k=k, n=n, **kind) for kind in kinds for m in rows)


# The widening product of an 8-billion-parameter Llama.
LARGE = _specs(ROWS, 4096, 14336)
# SmolLM2-135M's, whose 576 rows are no whole number of 128.
SMALL = _specs((1, 16), 576, 1536, group=64)