"""Cases of ``flora bench kernels``: the op against attention over all keys.

Arguments are as the projections of a layer leave them, heads side by side: a TPU keeps the last two
axes in tiles, and would copy ``[B, T, N, H]`` into that order first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.block_sparse_attention.api import block_sparse_attention
from flora_jax.kernels.block_sparse_attention.arg_specs import SPECS, Spec


def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention over all keys: cuDNN's on an NVIDIA GPU."""
    cudnn = jax.default_backend() == "gpu"
    implementation = "cudnn" if cudnn else None
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def attend(spec: Spec, *args: Any) -> jax.Array:
    """The op's first result."""
    args = [x.reshape(a.shape) for x, a in zip(args, spec.arguments())]
    blocks = {"block_q": spec.block_q, "block_k": spec.block_k}
    return flat(block_sparse_attention(*args, **blocks)[0])


def over_all(spec: Spec, *args: Any) -> jax.Array:
    """``softmax`` of flat arguments."""
    return flat(softmax(*(x.reshape(a.shape) for x, a in zip(args, spec.arguments()))))


def flat(x: Any) -> Any:
    """As a layer's projection leaves it: heads side by side."""
    shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    return jax.ShapeDtypeStruct(shape, x.dtype) if not hasattr(x, "reshape") else x.reshape(shape)


def cases() -> Iterable[Case]:
    """One per length."""
    return map(_case, SPECS)


def _case(spec: Spec) -> Case:
    *arrays, table = spec.arguments()
    args = (*map(flat, arrays), table)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        *arrays, table = spec.draw(key)
        return *map(flat, arrays), table

    return Case(
        name=spec.name,
        function=functools.partial(attend, spec),
        args=args,
        work=spec.work(),
        wrt=(0, 1, 2),
        gradient_work=spec.work(backward=True),
        rivals={"jax.nn": Rival(function=functools.partial(over_all, spec), args=args[:3])},
        draw=draw,
        small=spec.small,
    )
