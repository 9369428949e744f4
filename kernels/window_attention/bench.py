"""The op against jax's own attention with a local window; and Liger's attention, half a window and
half gated linear attention over all keys, as a whole (``hybrid``).

Arguments are as the projections of a layer leave them, heads side by side: a TPU keeps the last two
axes in tiles, and would copy ``[B, T, N, D]`` into that order first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Case, Rival, Work
from flora_jax.kernels.gated_linear_attention import gated_linear_attention
from flora_jax.kernels.gated_linear_attention.arg_specs import ArgSpec as Recurrence
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


def features(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Liger's."""
    return jax.nn.softmax(q), jax.nn.softmax(k), jax.nn.log_sigmoid(k) / 16


def hybrid(spec: Spec, part: str, *args: Any) -> jax.Array:
    """Liger's attention of rotated queries and keys, values, and both before the rotation.

    Args:
      part: ``hybrid``; ``linear``: without the window; ``apart``: the linear part alone, its
        features computed in float32 before the op.
    """
    q, k, v, q_plain, k_plain = _heads(spec, args)
    if part == "apart":
        *qk, decay = features(q_plain.astype(jnp.float32), k_plain.astype(jnp.float32))
        far, _ = gated_linear_attention(*qk, v.astype(jnp.float32), decay, scale=1.0)
        return _flat(far.astype(q.dtype))
    far, _ = gated_linear_attention(q_plain, k_plain, v, scale=1.0, features=features)
    if part == "linear":
        return _flat(far)
    near = window_attention(q, k, v, window=spec.window)[0]
    far, near = far.astype(jnp.float32), near.astype(jnp.float32)
    return _flat((0.5 * near + 0.5 * far).astype(q.dtype))


def _heads(spec: Spec, args: Any) -> list[jax.Array]:
    shapes = spec.arguments() + spec.arguments()[:2]
    return [x.reshape(a.shape) for x, a in zip(args, shapes)]


def _flat(x: Any) -> Any:
    """As a layer's projection leaves it: heads side by side."""
    shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    return jax.ShapeDtypeStruct(shape, x.dtype) if not hasattr(x, "reshape") else x.reshape(shape)


def cases() -> Iterator[Case]:
    """Windows of 64 and 512 over lengths, and SmolLM2's layer; Liger's attention and its parts."""
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
    for name, spec in BENCH.items():
        if spec.window == 64:
            yield from (_hybrid(part, name, spec) for part in ("hybrid", "linear", "apart"))


def _hybrid(part: str, name: str, spec: Spec) -> Case:
    args = tuple(map(_flat, spec.arguments() + spec.arguments()[:2]))
    q, k = (x.size * x.dtype.itemsize for x in args[:2])
    whole = part == "hybrid"
    linear = Recurrence(
        batch=spec.batch, length=spec.length, heads=spec.heads, kv_heads=spec.key_heads,
        dim=spec.dim, value_dim=spec.dim, dtype=spec.dtype,
    )  # fmt: skip
    flops = linear.flops() + whole * spec.work().flops
    back = 3 * linear.flops() + whole * spec.work(backward=True).flops
    return Case(
        name=f"{part} {name}",
        function=partial(hybrid, spec, part),
        args=args,
        work=Work(flops=flops, bytes=(2 + whole) * q + (2 + whole) * k, unit=spec.dtype),
        wrt=(0, 1, 2, 3, 4) if whole else (2, 3, 4),
        gradient_work=Work(
            flops=back, bytes=(3 + 2 * whole) * q + (4 + 2 * whole) * k, unit=spec.dtype
        ),
    )
