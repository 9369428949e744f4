"""Gated linear attention over lengths, against causal softmax attention.

Arguments are as the projections of a layer leave them, heads side by side: a TPU keeps the last two
axes in tiles, and would copy ``[B, T, N, D]`` into that order first. On a Hopper GPU the kernel
runs where it can, though by itself no platform takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.costs import Work
from flora_jax.kernels.gated_linear_attention.api import gated_linear_attention
from flora_jax.kernels.gated_linear_attention.arg_specs import BENCH, ArgSpec


def attend(spec: ArgSpec, *args: Any) -> tuple[jax.Array, jax.Array]:
    """The op."""
    out, state = gated_linear_attention(*_heads(spec, args))
    return out.reshape(*out.shape[:2], -1), state


def softmax(spec: ArgSpec, *args: Any) -> jax.Array:
    """Causal softmax attention."""
    return jax.nn.dot_product_attention(*_heads(spec, args), is_causal=True)


def _heads(spec: ArgSpec, args: Sequence[Any]) -> list[Any]:
    shapes = [x.shape for x in spec.shapes().values() if x is not None]
    return [x.reshape(shape) for x, shape in zip(args, shapes)]


def _flat(x: Any) -> Any:
    """As a layer's projection leaves it: heads side by side."""
    shape = (*x.shape[:2], math.prod(x.shape[2:]))
    return jax.ShapeDtypeStruct(shape, x.dtype) if not hasattr(x, "reshape") else x.reshape(shape)


def cases() -> Iterator[Case]:
    """SmolLM2's layer at three lengths, and the wide heads of the specification."""
    for length in (256, 1024, 4096):
        spec = ArgSpec(length=length, heads=9, kv_heads=3, dim=64, value_dim=64)
        yield _case(f"channel B=1 L={length} N=9 K=3 D=64 float32", spec, small=length <= 1024)
    for name, spec in BENCH.items():
        yield _case(name, spec)


def _case(name: str, spec: ArgSpec, small: bool = False) -> Case:
    args = tuple(_flat(x) for x in spec.shapes().values() if x is not None)
    work = Work(flops=spec.flops(), bytes=spec.bytes(), unit=spec.dtype)
    back = Work(flops=3 * spec.flops(), bytes=2 * spec.bytes(), unit=spec.dtype)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_flat(x) for x in spec.draw(key).values() if x is not None)

    return Case(
        name=name,
        function=partial(attend, spec),
        args=args,
        work=work,
        wrt=tuple(range(len(args))),
        gradient_work=back,
        rivals={"softmax": Rival(function=partial(softmax, spec), args=args[:3])},
        draw=draw,
        small=small,
    )
