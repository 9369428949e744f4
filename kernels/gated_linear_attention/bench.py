"""Gated linear attention over lengths, against causal softmax attention.

On a Hopper GPU the kernel runs where it can, though by itself no platform takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from flora_jax.kernels import dispatch
from flora_jax.kernels.bench_spec import Case, Rival, Work
from flora_jax.kernels.gated_linear_attention.api import gated_linear_attention
from flora_jax.kernels.gated_linear_attention.arg_specs import BENCH, ArgSpec


def attend(*args: Any) -> tuple[jax.Array, jax.Array]:
    """The op; what ``dispatch`` is told to choose comes first."""
    choice = dispatch.chosen(None)
    if choice is None and dispatch.platform() == "sm90":
        choice = ("mosaic_gpu", "xla")
    return gated_linear_attention(*args, implementation=choice)


def cases() -> Iterator[Case]:
    """SmolLM2's layer at three lengths, and the wide heads of the specification."""
    for length in (256, 1024, 4096):
        spec = ArgSpec(length=length, heads=9, kv_heads=3, dim=64, value_dim=64)
        yield _case(f"channel B=1 L={length} N=9 K=3 D=64 float32", spec, small=length <= 1024)
    for name, spec in BENCH.items():
        yield _case(name, spec)


def _case(name: str, spec: ArgSpec, small: bool = False) -> Case:
    arguments = {n: x for n, x in spec.shapes().items() if x is not None}
    args = tuple(arguments.values())
    work = Work(flops=spec.flops(), bytes=spec.bytes(), unit=spec.dtype)
    back = Work(flops=3 * spec.flops(), bytes=2 * spec.bytes(), unit=spec.dtype)
    softmax = partial(jax.nn.dot_product_attention, is_causal=True)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(x for x in spec.draw(key).values() if x is not None)

    return Case(
        name=name,
        function=attend,
        args=args,
        work=work,
        wrt=tuple(range(len(args))),
        gradient_work=back,
        rivals={"softmax": Rival(function=softmax, args=args[:3])},
        draw=draw,
        small=small,
    )
