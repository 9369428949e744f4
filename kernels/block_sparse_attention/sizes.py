"""How many blocks a step of the TPU kernels takes, by a small cost model (``kernels/costs.py``).

A step has a fixed cost and every block of it is an input of its own. Few blocks make many steps;
many are padding where a row's entries, or a key block's queries, are no multiple of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from flora_jax.kernels import costs
from flora_jax.kernels.block_sparse_attention.layout import Shape
from flora_jax.kernels.costs import Work

VMEM = 14 << 20
"""Bytes of blocks and tiles per grid step; the compiler's own limit is 16 MiB."""
INPUTS = 64
"""Of a kernel, about: a longer list takes long to compile."""
SOFTMAX, GRADIENT = 12, 10
"""Element-wise operations per score, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a TPU kernel holds and does.

    Args:
      name: for messages.
      taken, held: tokens of a block that a step takes several of, and of the one it keeps.
      arrays: with a block of each taken, and of the held's inputs and results.
      sums: float32 numbers kept per held token and channel.
      products: per pair of blocks.
      vector: element-wise operations per score.
    """

    name: str
    taken: int
    held: int
    arrays: tuple[int, int]
    sums: int
    products: int
    vector: int

    def memory(self, blocks: int, width: int, itemsize: int) -> int:
        """Bytes of VMEM of a step: inputs and results held twice, sums and tiles of scores."""
        lanes = costs.TPU.pad(width)
        taken, held = self.arrays
        moved = 2 * itemsize * lanes * (taken * blocks * self.taken + held * self.held)
        return moved + 4 * lanes * self.sums * self.held + 4 * 4 * blocks * self.taken * self.held

    def work(self, pairs: float, copied: float, shape: Shape, itemsize: int) -> tuple[Work, float]:
        """Of so many pairs of blocks, and of blocks copied in; and element-wise operations."""
        pad = costs.TPU.pad
        each = 2 * self.products * pad(self.taken) * pad(self.held) * shape.width
        moved = self.arrays[0] * copied * self.taken * shape.width * itemsize
        return Work(flops=pairs * each, bytes=moved), pairs * self.vector * self.taken * self.held


def forward(shape: Shape) -> Kernel:
    """Of the output: a query block stays, key blocks pass."""
    return Kernel(
        name="output", taken=shape.block_k, held=shape.block_q, arrays=(2, 2), sums=1, products=2,
        vector=SOFTMAX,
    )  # fmt: skip


def dq(shape: Shape) -> Kernel:
    """Of the queries' gradient, likewise."""
    return Kernel(
        name="queries' gradient", taken=shape.block_k, held=shape.block_q, arrays=(2, 4), sums=1,
        products=3, vector=GRADIENT,
    )  # fmt: skip


def dkv(shape: Shape) -> Kernel:
    """Of the keys' gradient: a key block stays, query blocks pass."""
    return Kernel(
        name="keys' gradient", taken=shape.block_q, held=shape.block_k, arrays=(2, 4), sums=2,
        products=4, vector=GRADIENT,
    )  # fmt: skip


def keys(shape: Shape, kernel: Kernel, dtype: Any) -> int:
    """Listed key blocks per step of :func:`forward` or :func:`dq`.

    Raises:
      NotImplementedError: a block, or what was asked for, does not fit the VMEM.
    """
    entries, rows = shape.entries, shape.batch * shape.heads * shape.query_blocks

    def seconds(blocks: int) -> float:
        steps = rows * -(-entries // blocks)
        work, vector = kernel.work(steps * blocks, steps * blocks, shape, dtype.itemsize)
        # A step multiplies the sum so far.
        vector += 2 * steps * shape.width * shape.block_q
        return costs.TPU.seconds(work, vector, steps)

    # Of all numbers that make as many steps, the one that pads least.
    fewest = {-(-entries // steps) for steps in range(1, entries + 1)}
    candidates = sorted(n for n in fewest if 2 * n <= INPUTS)
    return _choose(shape, kernel, dtype, shape.steps.keys, candidates, seconds)


def queries(shape: Shape, dtype: Any) -> int:
    """Query blocks per segment of the keys' gradient.

    Raises:
      NotImplementedError: as :func:`keys`.
    """
    kernel, heads = dkv(shape), shape.batch * shape.key_heads
    pairs = shape.repeats * shape.query_blocks * shape.entries

    def seconds(blocks: int) -> float:
        steps = -(-pairs // blocks) + shape.key_blocks
        # A key block's last segment is half empty on average: copied, not computed.
        copied = pairs + shape.key_blocks * (blocks - 1) / 2
        work, vector = kernel.work(heads * pairs, heads * copied, shape, dtype.itemsize)
        return costs.TPU.seconds(work, vector, heads * steps)

    most = min(INPUTS // 4, shape.repeats * shape.query_blocks)
    return _choose(shape, kernel, dtype, shape.steps.queries, range(1, most + 1), seconds)


def _choose(
    shape: Shape,
    kernel: Kernel,
    dtype: Any,
    given: int | None,
    candidates: Iterable[int],
    seconds: Callable[[int], float],
) -> int:
    def refusal(blocks: int) -> str | None:
        need = kernel.memory(blocks, shape.width, jnp.dtype(dtype).itemsize)
        if need <= VMEM:
            return None
        return f"{blocks} of {kernel.taken} x {kernel.held} need {need >> 20} MiB of {VMEM >> 20}"

    what = f"step of the {kernel.name} with blocks {shape.block_q} x {shape.block_k}"
    return costs.cheapest(
        candidates if given is None else [given], refusal=refusal, seconds=seconds, what=what
    )
