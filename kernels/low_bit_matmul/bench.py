"""Cases of ``flora bench kernels``: each format against the product of bfloat16 weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.costs import Work
from flora_jax.kernels.low_bit_matmul.api import low_bit_matmul
from flora_jax.kernels.low_bit_matmul.arg_specs import LARGE, SMALL, Spec
from flora_jax.kernels.low_bit_matmul.packing import LowBit


def cases() -> Iterator[Case]:
    for spec in LARGE:
        yield _case(spec, small=False)
    for spec in SMALL:
        yield _case(spec, small=True)


def _product(spec: Spec, x: jax.Array, w: LowBit) -> jax.Array:
    return low_bit_matmul(x, w, x_format=spec.x_format)


def _case(spec: Spec, small: bool) -> Case:
    x, w = spec.x(), spec.weight()
    flops = 2.0 * spec.m * spec.k * spec.n
    moved = w.nbytes + 2 * spec.m * (spec.k + spec.n)
    dense = jax.ShapeDtypeStruct((spec.k, spec.n), jnp.bfloat16)
    return Case(
        name=spec.name,
        function=functools.partial(_product, spec),
        args=(x, w),
        work=Work(flops=flops, bytes=moved, unit=spec.x_format or "bfloat16"),
        wrt=(0,),
        gradient_work=Work(flops=flops, bytes=moved),
        rivals={"bfloat16": Rival(function=jnp.matmul, args=(x, dense))},
        draw=spec.draw,
        small=small,
    )
