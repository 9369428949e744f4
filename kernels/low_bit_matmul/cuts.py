"""How the Hopper kernels cut a product into programs and steps, and which way a product takes.

There are three: a kernel with 16-bit factors, one with 8-bit factors, XLA. Estimates choose, of
what an H100 would take by its data sheet and the compiled kernels' instructions: no time was ever
measured. ``implementation="mosaic_gpu"`` alone keeps XLA out, ``"xla"`` the kernels, and
``blocks=Blocks(..., bits=)`` says which kernel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora_jax.kernels import costs
from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts, span
from flora_jax.kernels.low_bit_matmul.packing import LowBit, Rows

PROGRAMS = 198
"""As many programs, or the sum is split: three for every two of an H100's 132 multiprocessors."""
H100 = costs.DEVICES["h100"]
SMS, CLOCK = 132, 1.7e9
MATRIX, CACHE = 2048, 24.0
"""Of a multiprocessor in a cycle: products of 16 bits; bytes from the second-level cache, about."""
UNPACK = {
    (16, "int8"): 5,
    (16, "float8_e4m3fn"): 6,
    (16, "int4"): 10,
    (8, "int8"): 4,
    (8, "float8_e4m3fn"): 4,
    (8, "int4"): 6,
    (8, "int4 to float8"): 14,
}
"""Instructions per stored number, by the bits that the matrix unit takes: counted in the compiled
kernels (PTX without moves; conversions twice, for they have half the rate)."""
RESULT = {(16, False): 1, (16, True): 5, (8, False): 1, (8, True): 3}
"""Per result of a step's product: to scale and add it up; True: of int8 rows."""
CLEARLY = 0.9
"""The 8-bit kernel is taken where its estimate is below this share of the 16-bit one's."""
REACHED, LAUNCHES = 0.8, 10e-6
"""Of XLA: the share of the matrix unit's rate, seconds to start its kernels; both rough."""
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
      bits: of the matrix unit's factors.
    """

    m: int
    k: int
    n: int
    rows: int
    splits: int
    steps: int
    bits: int = 16


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
    if not k or common % k or (k != 32 and k % 64):
        raise NotImplementedError(
            f"steps of {k or 32} rows in groups of {w.group} and pieces of {span(w)} rows: "
            "32 or multiples of 64 that divide both"
        )
    if whole_groups and k > 128:
        raise NotImplementedError(
            f"steps of {k} rows: at most 128, of which float32 holds sums of integers exactly"
        )
    _columns(n, c)
    total = w.shape[-2] // parts(w) // k
    unit = group_steps(w, k) if whole_groups else 1
    splits = _splits(n // c * rows, total // unit)
    return Cut(m=block_m, k=k, n=c, rows=rows, splits=splits, steps=total // splits)


def forward8(x: Any, w: LowBit, out: Any, blocks: Blocks | None = None) -> Cut | None:
    """For the 8-bit matrix unit: steps of 128 or 64 stored rows of one group, 128 columns.

    Args:
      x: rows.
      w: the weight.
      out: dtype of the result.
      blocks: sizes that replace the chosen ones.

    Returns:
      None where that unit cannot be used: rows in 16 bits, zero points, int8 groups of several
      steps or of both nibbles, whose sums are to be exact, or shapes that do not fit.
    """
    n, common = w.shape[-1], math.gcd(span(w), w.group)
    if not isinstance(x, Rows) or x.zero is not None or w.zero is not None:
        return None
    alone, integer = w.groups == 1, x.values.dtype == jnp.int8
    # 256 rows: 128 registers of int32 and nothing beside them, results of 16 bits.
    most = 256 if integer and alone and jnp.dtype(out).itemsize == 2 else 128
    rows, block_m = _rows(x.shape[0], blocks, most)
    k = blocks.k if blocks else next((k for k in (128, 64) if common % k == 0), 0)
    c = blocks.n if blocks else 128
    if block_m > most or k not in (64, 128) or common % k or c not in (64, 128) or n % c:
        return None
    if integer and not alone and (group_steps(w, k) > 1 or one_group(w)):
        return None
    total = w.shape[-2] // parts(w) // k
    splits = 1 if integer and alone else _splits(n // c * rows, total)
    return Cut(m=block_m, k=k, n=c, rows=rows, splits=splits, steps=total // splits, bits=8)


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


def choose(
    x: Any, w: LowBit, out: Any, placement: str | None = None, blocks: Blocks | None = None
) -> Cut:
    """The cut of the 16-bit or, where it is clearly faster, of the 8-bit matrix unit.

    Scales of groups on the weight itself (``placement="weight"``) take 16 bits.

    Raises:
      NotImplementedError: no cut fits, with the reason.
    """
    asked = blocks and blocks.bits
    possible = placement != "weight" and asked != 16 and (asked == 8 or x.shape[0] > WIDE)
    narrow = forward8(x, w, out, blocks) if possible else None
    if asked == 8:
        if narrow is None:
            raise NotImplementedError(
                "8 bits: quantised rows, no zero points, steps of 64 or 128 rows of one group (all "
                "of it, of int8 rows), 64 or 128 columns"
            )
        return narrow
    wide = forward(x.shape[0], w, blocks, whole_groups=_integer(x))
    if narrow is None or seconds(x, w, narrow) > CLEARLY * seconds(x, w, wide):
        return wide
    return narrow


def seconds(x: Any, w: LowBit, cut: Cut) -> float:
    """An estimate, to choose by, of a forward product."""
    kind = "int4 to float8" if w.format == "int4" and cut.bits == 8 else w.format
    kind = w.format if _integer(x) else kind
    each = RESULT[cut.bits, _integer(x)] * parts(w)
    if cut.bits == 8 and w.groups == 1:
        each = 0 if _integer(x) else 1
    moved = cut.k * cut.n + parts(w) * cut.m * cut.k * cut.bits // 8
    programs = w.shape[-1] // cut.n * cut.rows * cut.splits
    return _seconds(w, cut, UNPACK[cut.bits, kind], each * cut.n, moved, programs)


def _seconds(
    w: LowBit, cut: Cut, unpack: float, each: float, moved: float, programs: int
) -> float:
    """A multiprocessor takes the longest of what a step issues, multiplies and copies.

    Args:
      unpack: instructions per stored number.
      each: instructions per step and row of x.
      moved: bytes of a step.
    """
    # Four schedulers of 32 lanes.
    issued = (cut.k * cut.n * unpack + cut.m * each) / 128
    multiplied = cut.m * cut.n * cut.k * parts(w) / (MATRIX * 16 / cut.bits)
    turns = math.ceil(programs / SMS) * cut.steps
    return max(w.nbytes / H100.bytes, turns * max(issued, multiplied, moved / CACHE) / CLOCK)


def slower(
    x: Any, w: LowBit, bias: Any, *, dtype: Any, placement: Any, blocks: Any, **_: Any
) -> str | None:
    """Why XLA's product is expected to be faster than the kernel, or None.

    With many rows of x it pays to dequantise the weight once. Where a column has one scale,
    quantised rows multiply in 8 bits in XLA, too; otherwise its product of each group is written
    out, and the kernel is taken at any number of rows. ``blocks`` ask for the kernel.
    """
    grouped = w.groups > 1 and (isinstance(x, Rows) or placement == "partial")
    if blocks is not None or grouped:
        return None
    kernel = seconds(x, w, choose(x, w, dtype, placement))
    return _slower(x, w, kernel, 8 if isinstance(x, Rows) else 16)


def slower_dx(dy: Any, w: LowBit, *, blocks: Any, **_: Any) -> str | None:
    """As :func:`slower`, of the gradient by x."""
    if blocks is not None:
        return None
    cut = dx(dy.shape[0], w)
    # Its numbers are rescaled: to float32 and back.
    unpack = UNPACK[16, w.format] + 4 * parts(w)
    moved = cut.k * cut.n + 2 * cut.m * cut.n
    programs = w.shape[0] // parts(w) // cut.k * cut.rows * cut.splits
    return _slower(dy, w, _seconds(w, cut, unpack, 0, moved, programs), 16)


def _slower(x: Any, w: LowBit, kernel: float, bits: int) -> str | None:
    # Written in the unit's numbers, 8-bit ones also with K contiguous, and read again.
    size = math.prod(w.shape)
    moved = w.nbytes + 2 * size * bits // 8
    rate = H100.rate("int8" if bits == 8 else "bfloat16") * REACHED
    xla = moved / H100.bytes + 2 * x.shape[0] * size / rate + LAUNCHES
    if kernel <= xla:
        return None
    return f"{x.shape[0]} rows: about {kernel * 1e6:.0f} us, XLA's {xla * 1e6:.0f} us"


def _integer(x: Any) -> bool:
    return isinstance(x, Rows) and x.values.dtype == jnp.int8


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
