"""Liger's attention: does it pay to compute the window and the recurrence in one kernel?

The same sum three times: by the op, by its two ops (``two ops``), and by them after features that
XLA computes in float32 (``features apart``). Arguments are as the projections of a layer leave
them, heads side by side: a TPU keeps the last two axes in tiles, and would copy ``[B, T, N, D]``
into that order first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Case, Work
from flora_jax.kernels.gated_linear_attention import gated_linear_attention
from flora_jax.kernels.gated_linear_attention.arg_specs import ArgSpec
from flora_jax.kernels.hybrid_attention.api import apart, hybrid_attention
from flora_jax.kernels.window_attention import window_attention
from flora_jax.kernels.window_attention.arg_specs import BENCH, Spec

FORMS = ("one op", "two ops", "features apart")


def features(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Liger's."""
    return jax.nn.softmax(q), jax.nn.softmax(k), jax.nn.log_sigmoid(k) / 16


def attend(spec: Spec, form: str, *args: Any) -> jax.Array:
    """One of ``FORMS``, of rotated queries and keys, values, and both before the rotation."""
    q, k, v, *plain = [x.reshape(a.shape) for x, a in zip(args, _arguments(spec))]
    how = {"features": features, "window": spec.window}
    if form == "one op":
        out = hybrid_attention(q, k, v, *plain, **how)
    elif form == "two ops":
        out = apart(q, k, v, *plain, **how, weights=(0.5, 0.5), scale=spec.dim**-0.5)
    else:
        near, _, _ = window_attention(q, k, v, window=spec.window)
        *qk, decay = features(*(x.astype(jnp.float32) for x in plain))
        far, _ = gated_linear_attention(*qk, v.astype(jnp.float32), decay, scale=1.0)
        out = (0.5 * near.astype(jnp.float32) + 0.5 * far).astype(q.dtype)
    return out.reshape(*out.shape[:2], -1)


def _arguments(spec: Spec) -> tuple[jax.ShapeDtypeStruct, ...]:
    return spec.arguments() + spec.arguments()[:2]


def cases() -> Iterator[Case]:
    """A window of 64 keys, with 16 and with 4 key heads."""
    for name, spec in BENCH.items():
        if spec.window == 64:
            yield from (_case(form, name, spec) for form in FORMS)


def _case(form: str, name: str, spec: Spec) -> Case:
    flat = lambda x: jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3]), x.dtype)
    q, k = (x.size * x.dtype.itemsize for x in spec.arguments()[:2])
    linear = ArgSpec(
        batch=spec.batch, length=spec.length, heads=spec.heads, kv_heads=spec.key_heads,
        dim=spec.dim, value_dim=spec.dim, dtype=spec.dtype,
    )  # fmt: skip
    window, back = spec.work().flops, spec.work(backward=True).flops
    return Case(
        name=f"{form} {name}",
        function=partial(attend, spec, form),
        args=tuple(map(flat, _arguments(spec))),
        work=Work(flops=window + linear.flops(), bytes=3 * q + 3 * k, unit=spec.dtype),
        wrt=(0, 1, 2, 3, 4),
        gradient_work=Work(flops=back + 3 * linear.flops(), bytes=5 * q + 6 * k, unit=spec.dtype),
    )
