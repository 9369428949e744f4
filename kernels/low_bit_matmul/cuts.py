"""How the Hopper kernels cut a product into programs and steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax import lax

from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts, span
from flora_jax.kernels.low_bit_matmul.packing import LowBit

PROGRAMS = 198
"""As many programs, or the sum is split: three for every two of an H100's 132 multiprocessors."""
WIDE = 32
"""More rows of x than this: two warpgroups share what is copied of x."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of one program.

    Attributes:
      m: rows of x, a multiple of 8.
      k: rows of the stored array: of a step (forward), of a program (dx).
      n: columns: of a program (forward), of a step (dx).
      rows: programs along the rows of x.
      splits: programs that share a sum.
      steps: steps of a program.
    """

    m: int
    k: int
    n: int
    rows: int
    splits: int
    steps: int


def forward(m: int, w: LowBit, blocks: Blocks | None = None, whole_groups: bool = False) -> Cut:
    """Steps of 128, 64 or 32 stored rows of one group; programs of 64 or 128 columns.

    Args:
      m: rows of x.
      w: the weight.
      blocks: sizes that replace the chosen ones.
      whole_groups: no group's sum is split.

    Raises:
      NotImplementedError: no cut fits, with the reason.
    """
    n = w.shape[-1]
    # A group's int32 sum takes registers beside the total's.
    rows, block_m = _rows(m, blocks, 64 if whole_groups else 128)
    common = math.gcd(span(w), w.group)
    steps = [k for k in (128, 64, 32) if common % k == 0 and (k < 128 or block_m <= 64)]
    columns = [c for c in (128, 64) if n % c == 0 and (c == 64 or block_m > WIDE)]
    k = blocks.k if blocks else next(iter(steps), 0)
    c = blocks.n if blocks else next(iter(columns), 0)
    if not k or common % k or k % 32:
        raise NotImplementedError(
            f"steps of {k or 32} rows in groups of {w.group} and pieces of {span(w)} rows: "
            "multiples of 32 that divide both"
        )
    _columns(n, c)
    total = w.shape[-2] // parts(w) // k
    unit = group_steps(w, k) if whole_groups else 1
    splits = _splits(n // c * rows, total // unit)
    return Cut(m=block_m, k=k, n=c, rows=rows, splits=splits, steps=total // splits)


def dx(m: int, w: LowBit, blocks: Blocks | None = None) -> Cut:
    """Programs of 64 or 128 stored rows of one group; steps of 128 or 64 columns.

    Raises:
      NotImplementedError: no cut fits, with the reason.
    """
    n = w.shape[-1]
    rows, block_m = _rows(m, blocks, 128)
    common = math.gcd(span(w), w.group)
    stored = [k for k in (128, 64) if common % k == 0 and (k == 64 or block_m > WIDE)]
    # Wider steps take more registers than two programs of a multiprocessor have.
    wide = block_m <= 64 and parts(w) == 1
    columns = [c for c in (128, 64) if n % c == 0 and (c == 64 or wide)]
    k = blocks.k if blocks else next(iter(stored), 0)
    c = blocks.n if blocks else next(iter(columns), 0)
    if k not in (64, 128) or common % k:
        raise NotImplementedError(
            f"programs of {k or 64} rows in groups of {w.group} and pieces of {span(w)} rows: "
            "64 or 128 that divide both"
        )
    _columns(n, c)
    programs = w.shape[-2] // parts(w) // k * rows
    splits = _splits(programs, n // c)
    return Cut(m=block_m, k=k, n=c, rows=rows, splits=splits, steps=n // c // splits)


def _rows(m: int, blocks: Blocks | None, most: int) -> tuple[int, int]:
    """Programs along the rows of x, and the rows of each."""
    if blocks is not None:
        if blocks.m % 8 or blocks.m > 256:
            raise NotImplementedError(f"m={blocks.m}: a multiple of 8, at most 256")
        return math.ceil(m / blocks.m), blocks.m
    count = math.ceil(m / most)
    return count, math.ceil(math.ceil(m / count) / 8) * 8


def _columns(n: int, c: int) -> None:
    if c not in (64, 128) or n % c:
        raise NotImplementedError(f"{n} columns in blocks of {c or 64}: 64 or 128 that divide them")


def _splits(programs: int, units: int) -> int:
    """The fewest equal parts of the sum that make enough programs."""
    divisors = [d for d in range(1, units + 1) if units % d == 0]
    return next((d for d in divisors if programs * d >= PROGRAMS), divisors[-1])


def one_group(w: LowBit) -> bool:
    """The low and the high nibbles of a stored row are always of one group."""
    return parts(w) == 2 and w.group % (2 * span(w)) == 0


def group_steps(w: LowBit, k: int) -> int:
    """Steps of ``k`` stored rows between those where a group starts."""
    return (w.group // 2 if one_group(w) else min(w.group, span(w))) // k


def weight_row(w: LowBit, row: Any, part: int) -> Any:
    """The weight's row whose codes are the low (part 0) or high nibbles of a stored row."""
    if parts(w) == 1:
        return row
    # Of ``//`` a kernel's compiler makes much more, for the signs.
    half = span(w)
    return lax.div(row, half) * (2 * half) + lax.rem(row, half) + part * half
