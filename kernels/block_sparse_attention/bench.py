"""Cases of ``flora bench kernels``: the op against attention over all keys."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.block_sparse_attention.api import block_sparse_attention
from flora_jax.kernels.block_sparse_attention.arg_specs import SPECS


def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention over all keys: cuDNN's on an NVIDIA GPU."""
    cudnn = jax.default_backend() == "gpu"
    implementation = "cudnn" if cudnn else None
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def attend(block_q: int, block_k: int, *args: Any) -> jax.Array:
    """The op's first result."""
    return block_sparse_attention(*args, block_q=block_q, block_k=block_k)[0]


def cases() -> Iterable[Case]:
    """One per length."""
    for spec in SPECS:
        args = spec.arguments()
        yield Case(
            name=spec.name,
            function=functools.partial(attend, spec.block_q, spec.block_k),
            args=args,
            work=spec.work(),
            wrt=(0, 1, 2),
            gradient_work=spec.work(backward=True),
            rivals={"jax.nn": Rival(function=softmax, args=args[:3])},
            draw=spec.draw,
            small=spec.small,
        )
