"""The op against jax's own attention with a local window.

Arguments are as the projections of a layer leave them, heads side by side: a TPU keeps the last two
axes in tiles, and would copy ``[B, T, N, D]`` into that order first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.window_attention.api import window_attention
from flora_jax.kernels.window_attention.arg_specs import BENCH, SMOLLM2, Spec


def attend(spec: Spec, *args: Any) -> jax.Array:
    """The op's first result."""
    return _flat(window_attention(*_heads(spec, args), window=spec.window)[0])


def local(spec: Spec, *args: Any) -> jax.Array:
    """``jax.nn.dot_product_attention`` with a window."""
    before = (spec.window - 1, 0)
    out = jax.nn.dot_product_attention(
        *_heads(spec, args), is_causal=True, local_window_size=before
    )
    return _flat(out)


def _heads(spec: Spec, args: Any) -> list[jax.Array]:
    return [x.reshape(a.shape) for x, a in zip(args, spec.arguments())]


def _flat(x: Any) -> Any:
    """As a layer's projection leaves it: heads side by side."""
    shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    return jax.ShapeDtypeStruct(shape, x.dtype) if not hasattr(x, "reshape") else x.reshape(shape)


def cases() -> Iterator[Case]:
    """Windows of 64 and 512 over lengths, and SmolLM2's layer."""
    for name, spec in {**SMOLLM2, **BENCH}.items():
        args = tuple(map(_flat, spec.arguments()))
        yield Case(
            name=name,
            function=partial(attend, spec),
            args=args,
            work=spec.work(),
            wrt=(0, 1, 2),
            gradient_work=spec.work(backward=True),
            rivals={"jax.nn": Rival(function=partial(local, spec), args=args)},
            small=spec.length <= 1024,
        )
