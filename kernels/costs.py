"""How every kernel chooses the sizes of its blocks: the cheapest candidate that fits.

An op counts what a candidate would do (products, element-wise operations, bytes, steps), a machine
says what that takes. These are estimates that put candidates in order, no predictions: beside the
data sheets' rates stand rough constants, and nothing here has been fitted to a TPU or GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax

from flora_jax.kernels import dispatch

Candidate = TypeVar("Candidate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a call does, at least: what the roofline is computed from.

    Args:
      flops: multiplications and additions on the matrix unit.
      bytes: read and written in main memory.
      unit: dtype of the matrix products, a key of :attr:`Device.flops`.
    """

    flops: float
    bytes: float
    unit: str = "bfloat16"


def declared(work: Work) -> contextlib.AbstractContextManager[None]:
    """Kernels called inside do this work, which a compiler that counts nothing of them is not told.

    It becomes part of their names in the program, where :func:`declarations` finds it.
    """
    return jax.named_scope(f"kernel[flops={work.flops:.0f},bytes={work.bytes:.0f}]")


def declarations(program: str) -> list[Work]:
    """What the kernels called in a compiled program's text declare, one of each call; a loop's body
    stands there once.

    >>> declarations('custom_call_target="f", metadata={op_name="a/kernel[flops=8,bytes=4]/b"}')
    [Work(flops=8.0, bytes=4.0, unit='bfloat16')]
    """
    calls = (line for line in program.splitlines() if "custom_call_target" in line)
    found = (re.search(r"kernel\[flops=(\d+),bytes=(\d+)\]", line) for line in calls)
    return [Work(flops=float(m[1]), bytes=float(m[2])) for m in found if m]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates: ``bytes`` per second of main memory, ``flops`` per second by dtype.

    A dtype that has no entry runs at the rate of bfloat16.
    """

    bytes: float
    flops: Mapping[str, float]

    def bound(self, work: Work) -> float:
        """Seconds that ``work`` takes at least."""
        return max(work.bytes / self.bytes, work.flops / self.rate(work.unit))

    def rate(self, unit: str) -> float:
        """Flops per second of a dtype."""
        return self.flops.get(unit, self.flops["bfloat16"])


# The H200 row is what a copy and a bfloat16 product reached on one, int8 and fp8 taken as twice
# that; the others are the figures of the data sheets.
DEVICES = {
    "h200": Device(
        bytes=4.3e12,
        flops={"bfloat16": 790e12, "int8": 1580e12, "float8_e4m3fn": 1580e12, "float32": 60e12},
    ),
    "h100": Device(
        bytes=3.35e12,
        flops={"bfloat16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12, "float32": 67e12},
    ),
    "tpu_v5e": Device(bytes=0.82e12, flops={"bfloat16": 197e12, "int8": 394e12}),
    "tpu_v6e": Device(bytes=1.64e12, flops={"bfloat16": 918e12, "int8": 1836e12}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What an op's model counts with.

    Args:
      device: rates of memory and matrix unit.
      vector: element-wise operations a second, on float32.
      step: seconds that a step of a grid, or a turn of XLA's loop, takes beside its work.
      exact: how many bfloat16 products an exact product of float32 takes the time of.
      side: the matrix unit's; the dimensions of a product are padded to multiples of it.
    """

    device: Device
    vector: float
    step: float
    exact: float = 1.0
    side: int = 1

    def pad(self, size: int) -> int:
        """``size`` as the matrix unit sees it."""
        return -(-size // self.side) * self.side

    def seconds(self, work: Work, vector: float, steps: float) -> float:
        """Memory beside arithmetic, whichever is longer, and the steps."""
        arithmetic = work.flops / self.device.rate(work.unit) + vector / self.vector
        return max(work.bytes / self.device.bytes, arithmetic) + self.step * steps


TPU = Machine(device=DEVICES["tpu_v5e"], vector=4e12, step=0.35e-6, exact=6, side=128)
"""A v5e, where memory is slowest, for all TPUs: only ratios order candidates."""
GPU = Machine(device=DEVICES["h100"], vector=0.5e12, step=50e-6, exact=15)
"""A loop of XLA on an H100: each turn starts ten kernels or more, which hand one another their
results through memory."""
CPU = Machine(device=Device(bytes=20e9, flops={"bfloat16": 50e9}), vector=10e9, step=200e-6)
"""A loop of XLA on two cores, roughly as a few shapes of gated linear attention took it."""


def xla_machine() -> Machine:
    """What XLA's own code is traced for, on this machine or for a target."""
    platform = dispatch.platform()
    if platform == "tpu":
        return TPU
    return GPU if platform == "sm90" or jax.default_backend() == "gpu" else CPU


def cheapest(
    candidates: Iterable[Candidate],
    *,
    refusal: Callable[[Candidate], str | None],
    seconds: Callable[[Candidate], float],
    what: str,
) -> Candidate:
    """The candidate that takes the least time of those that nothing refuses; of equals the first.

    Args:
      refusal: why a candidate is impossible, or None.
      seconds: the estimate.
      what: "blocks for ...", for the message.

    Raises:
      NotImplementedError: all are refused; says why the first is.

    >>> cheapest([1, 2, 4], refusal=lambda n: "too long" if n > 2 else None,
    ...          seconds=lambda n: 1 / n, what="steps")
    2
    """
    reasons, fitting = [], []
    for candidate in candidates:
        reason = refusal(candidate)
        if reason is None:
            fitting.append(candidate)
        else:
            reasons.append(reason)
    if not fitting:
        raise NotImplementedError(f"no {what}: {reasons[0]}")
    return min(fitting, key=seconds)
