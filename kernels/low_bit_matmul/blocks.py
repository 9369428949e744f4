"""Block sizes of the TPU kernels by a small cost model (``kernels/costs.py``)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import costs
from flora_jax.kernels.low_bit_matmul.packing import LowBit

VMEM = 12 << 20
"""Bytes that the blocks, twice, and what a step computes may take: under the 16 MB that a TPU core
gives a kernel unasked."""
UNPACK = 10
"""Vector operations per weight from the byte to bfloat16, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of a step.

    Args:
      m: rows of x.
      k: rows of the stored array; of int4 each is two rows of the weight.
      n: columns.
      bits: on Hopper GPUs, of the matrix unit's factors: 8 or 16; default by the cost model.

    Raises:
      ConfigError: a size below 1, other bits.
    """

    m: int
    k: int
    n: int
    bits: int | None = None

    def __post_init__(self):
        if min(self.m, self.k, self.n) < 1 or self.bits not in (None, 8, 16):
            raise ConfigError(f"{self}: sizes of at least 1, 8 or 16 bits")


def parts(w: LowBit) -> int:
    """Codes per stored number: slices of x that a step reads."""
    return 2 if w.format == "int4" else 1


def span(w: LowBit) -> int:
    """Stored rows that lie in one piece: half a tile of int4, everything of 8-bit codes."""
    return w.tile // 2 if w.format == "int4" else w.shape[-2]


def refusal(w: LowBit, blocks: Blocks, most: int | None = None) -> str | None:
    """Why the kernels cannot take these blocks, or None.

    ``most``: rows of a group in a step, at most.
    """
    whole = span(w)
    if most is not None and min(blocks.k, w.group) > most:
        return f"k={blocks.k} takes more than {most} rows of a group, for rows with zero points"
    if whole % blocks.k:
        return f"k={blocks.k} does not divide the {whole} stored rows in one piece"
    if blocks.k % w.group and w.group % blocks.k:
        return f"k={blocks.k} and groups of {w.group} do not divide one another"
    if blocks.k % 128 and blocks.k * parts(w) != w.shape[-2] * (parts(w) == 1):
        return f"k={blocks.k} is no multiple of 128 lanes"
    if blocks.n % 128 and blocks.n != w.shape[-1]:
        return f"n={blocks.n} is no multiple of 128 lanes"
    return None


def memory(w: LowBit, blocks: Blocks, x: Any, out: Any) -> int:
    """Bytes of VMEM that a step takes, forward; ``x`` and ``out`` are dtypes."""
    m, k, n = blocks.m, blocks.k, blocks.n
    size = lambda dtype: jnp.dtype(dtype).itemsize
    groups = -(-max(1, k // w.group) // 8) * 8
    scales = groups * n * 4 * parts(w) * (1 if w.zero is None else 2)
    moved = parts(w) * m * k * size(x) + k * n + scales + m * n * size(out)
    computed = k * n * (4 + parts(w) * 2 * size(x)) + 2 * m * n * 4
    return 2 * moved + computed


def seconds(m: int, w: LowBit, blocks: Blocks, x: Any, out: Any) -> float:
    """An estimate that orders blocks; not a prediction."""
    k, n = w.shape[-2:]
    times_w, times_x = math.ceil(m / blocks.m), math.ceil(n / blocks.n)
    size = lambda dtype: jnp.dtype(dtype).itemsize
    moved = w.nbytes * times_w + m * k * size(x) * times_x + m * n * size(out)
    padded = max(blocks.m, 8) * times_w
    work = costs.Work(flops=2 * padded * k * n, bytes=moved)
    steps = times_w * times_x * (k // parts(w) // blocks.k)
    return costs.TPU.seconds(work, UNPACK * k * n * times_w, steps)


def choose(m: int, w: LowBit, x: Any, out: Any, most: int | None = None) -> Blocks:
    """The blocks that the model likes best; ``most`` as in :func:`refusal`.

    Raises:
      NotImplementedError: none fits, with the reason.
    """

    def refused(blocks: Blocks) -> str | None:
        reason = refusal(w, blocks, most)
        if reason is None and memory(w, blocks, x, out) > VMEM:
            reason = f"k={blocks.k} n={blocks.n} takes more than {VMEM >> 20} MB of VMEM"
        return reason

    return costs.cheapest(
        _candidates(m, w),
        refusal=refused,
        seconds=lambda blocks: seconds(m, w, blocks, x, out),
        what=f"blocks for {w.shape} in tiles of {w.tile}",
    )


def _candidates(m: int, w: LowBit) -> list[Blocks]:
    """Small ones first, which win where estimates are equal."""
    n, whole = w.shape[-1], span(w)
    rows = [m] if m <= 256 else [256, 512]
    columns = [c for c in (128, 256, 512, 1024, 2048) if c < n] + ([n] if n <= 2048 else [])
    steps = [d for d in range(128, whole + 1) if whole % d == 0] or [whole]
    return [Blocks(m=r, k=k, n=c) for k in steps for c in columns for r in rows]
