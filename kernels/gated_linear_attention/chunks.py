"""The length of a chunk, by a small cost model (``kernels/costs.py``).

A longer chunk means fewer steps and fewer states, and more pairs: each token meets C others, at
log2(C) levels if decays are per channel. Where the matrix unit works on 128 x 128 numbers, shorter
chunks leave part of it idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels import costs
from flora_jax.kernels.costs import Machine, Work

CHUNKS = (16, 32, 64, 128, 256)
MASK, EXP = 12, 8
"""Element-wise operations: of a level's mask, and of an exponential, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Static sizes of one call.

    Args:
      heads: of keys; each has ``group`` query heads.
      gate: 0 without one, 1 per head, the keys' width per channel.
      dtype: of queries, keys and values.
    """

    batch: int
    length: int
    heads: int
    group: int
    dim: int
    value_dim: int
    gate: int
    dtype: Any

    @property
    def whole(self) -> int:
        """The chunk that holds the sequence; a longer one is padding."""
        return 1 << max(self.length - 1, 0).bit_length()

    def chunks(self, least: int) -> list[int]:
        """The candidates, of ``least`` tokens or more."""
        return [c for c in CHUNKS if c <= max(self.whole, least)] or [self.whole]


def call_of(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None) -> Call:
    """From the arguments of an implementation."""
    batch, length, heads, dim = k.shape
    return Call(
        batch=batch, length=length, heads=heads, group=q.shape[2] // heads, dim=dim,
        value_dim=v.shape[3], gate=0 if g is None else g.shape[3], dtype=jnp.dtype(q.dtype),
    )  # fmt: skip


def choose(
    call: Call,
    machine: Machine,
    *,
    refusal: Callable[[int], str | None] = lambda chunk: None,
    least: int = 1,
    together: bool = False,
) -> int:
    """The chunk of the least estimated time.

    Args:
      refusal: why a chunk cannot be, or None.
      least: a chunk of a shorter sequence; a power of two up to 16.
      together: a step takes the chunks of all heads and rows of the batch at once.

    Raises:
      NotImplementedError: every chunk is refused; says why the shortest is.
    """
    return costs.cheapest(
        call.chunks(least),
        refusal=refusal,
        seconds=lambda chunk: seconds(call, machine, chunk, together),
        what=f"chunk for heads of {call.dim} and {call.value_dim}, {call.group} to a key head",
    )


def seconds(call: Call, machine: Machine, chunk: int, together: bool = False) -> float:
    """An estimate of the forward pass; the backward pass does about three times its work."""
    count = -(-call.length // chunk)
    units = call.batch * call.heads * count
    flops, vector = _tile(call, machine, chunk)
    moved = _bytes(call, chunk)
    work = Work(flops=units * flops, bytes=units * moved)
    return machine.seconds(work, units * vector, count if together else units)


def _tile(call: Call, machine: Machine, chunk: int) -> tuple[float, float]:
    """Flops, padded and in bfloat16's, and element-wise operations of a chunk of a key head."""
    pad, wide = machine.pad, machine.pad(chunk)
    product = lambda m, n, k: 2 * m * pad(n) * pad(k)
    once = machine.exact if call.dtype == jnp.float32 else 1
    c, k, v, group = chunk, call.dim, call.value_dim, call.group
    levels = chunk.bit_length() - 1
    scores = group * once * product(c, c, k)
    flops = group * once * (product(c, v, c) + product(c, v, k)) + once * product(v, k, c)
    vector = 4 * c * (group * (pad(k) + pad(v)) + pad(k) + pad(v))
    if call.gate:
        flops += 2 * machine.exact * product(c, call.gate, c)
        vector += levels * MASK * c * wide + 2 * EXP * c * pad(call.gate)
    if call.gate > 1:
        flops += levels * (machine.exact * product(c, k, c) + scores)
        vector += levels * c * ((EXP + 1 + group) * pad(k) + 2 * group * wide)
        return flops, vector
    if call.gate:
        flops += levels * machine.exact * (product(c, 1, c) + product(8, c, c))
        vector += (2 * levels + EXP) * c * wide
    return flops + scores, vector + 2 * group * c * wide


def _bytes(call: Call, chunk: int) -> float:
    """Arguments and results of a chunk, zeros behind the end too, and the state before it, which
    the backward pass writes and reads."""
    rows = (call.group + 1) * (call.dim + call.value_dim) * call.dtype.itemsize + 4 * call.gate
    return chunk * rows + 2 * 4 * call.dim * call.value_dim
