"""Chunks in a scan: memory ``O(T (K + V) + (T / C) K V)``, states computed again in the backward
pass."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels import costs
from flora_jax.kernels.gated_linear_attention import tiles
from flora_jax.kernels.gated_linear_attention.chunks import call_of, choose


def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    state: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``(o [B, T, N, V], state [B, H, K, V])``.

    Args:
      q: ``[B, T, N, K]``.
      k, v: ``[B, T, H, K]``, ``[B, T, H, V]``.
      g: ``[B, T, H, K]``, ``[B, T, H, 1]`` or None.
      state: ``[B, H, K, V]`` float32.
      segments: ``[B, T]``, 0 where the given state continues, then rising; or None.
      chunk: a power of two; no longer than a short sequence needs. Default: ``chunks.choose``.
    """
    call = call_of(q, k, v, g)
    if chunk is None:
        chunk = choose(call, costs.xla_machine(), together=True)
    how = _How(scale=scale, chunk=min(chunk, call.whole))
    return _attend(how, q, k, v, g, state, segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    scale: float
    chunk: int

    def dot(self, dtype: Any) -> tiles.Dot:
        exact = jnp.dtype(dtype) == jnp.float32
        return tiles.Dot(precision=tiles.FLOAT32 if exact else jax.lax.Precision.DEFAULT)


def split(x: jax.Array, chunk: int, heads: int) -> jax.Array:
    """``[B, T, N, D] -> [n, B, H, N/H, C, D]``, float32, zeros behind the end."""
    batch, length, all_heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, heads, all_heads // heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).astype(jnp.float32)


def join(x: jax.Array, length: int, dtype: Any) -> jax.Array:
    """The inverse of :func:`split`."""
    n, batch, heads, group, chunk, dim = x.shape
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, n * chunk, heads * group, dim)
    return x[:, :length].astype(dtype)


def _chunks(
    how: _How, q: jax.Array, k: jax.Array, v: jax.Array, g: Any, segments: Any
) -> tuple[Any, ...]:
    """What the scans run over, chunks first; keys, values and gates without the group axis."""
    heads = k.shape[2]
    one = lambda x: None if x is None else split(x, how.chunk, heads)[:, :, :, 0]
    numbers = None
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % how.chunk)), mode="edge")
        numbers = padded.reshape(padded.shape[0], -1, how.chunk).swapaxes(0, 1)
        before = jnp.concatenate([jnp.zeros_like(numbers[:1, :, 0]), numbers[:-1, :, -1]])
        numbers = (numbers, before)
    return split(q, how.chunk, heads) * how.scale, one(k), one(v), one(g), numbers


def _keep(numbers: Any) -> tiles.Keep | None:
    return None if numbers is None else tiles.keep_of(*numbers)


def _per_head(tile: Any) -> Any:
    """``tile(numbers, *arrays)`` over batch and heads; segment numbers are of the batch only."""
    return lambda numbers, *arrays: jax.vmap(jax.vmap(tile, (None, *[0] * len(arrays))))(
        numbers, *arrays
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, g, state, segments):
    dot = how.dot(q.dtype)
    tile = _per_head(
        lambda numbers, q, k, v, g, state: tiles.forward(q, k, v, g, state, _keep(numbers), dot)
    )

    def step(state, chunk):
        q, k, v, g, numbers = chunk
        out, state = tile(numbers, q, k, v, g, state)
        return state, out

    state, out = jax.lax.scan(step, state.swapaxes(2, 3), _chunks(how, q, k, v, g, segments))
    return join(out, q.shape[1], q.dtype), state.swapaxes(2, 3)


def _attend_forward(how, q, k, v, g, state, segments):
    return _attend(how, q, k, v, g, state, segments), (q, k, v, g, state, segments)


def _states(how, dot, state, chunks):
    """States before every chunk ``[n, B, H, V, K]`` and the last."""

    def tile(numbers, k, v, g, state):
        return tiles.update(state, k, v, tiles.decays(g, _keep(numbers), how.chunk), dot)

    def step(state, chunk):
        _, k, v, g, numbers = chunk
        return _per_head(tile)(numbers, k, v, g, state), state

    last, before = jax.lax.scan(step, state, chunks)
    return before, last


def _attend_backward(how, saved, cotangents):
    q, k, v, g, state, segments = saved
    d_out, d_last = cotangents
    length, dot, heads = q.shape[1], how.dot(q.dtype), k.shape[2]
    chunks = _chunks(how, q, k, v, g, segments)
    before, last = _states(how, dot, state.swapaxes(2, 3), chunks)
    d_last = d_last.astype(jnp.float32).swapaxes(2, 3)
    later = None
    if g is not None:
        axes = (2,) if g.shape[-1] > 1 else (2, 3)
        later = jnp.sum(last * d_last, axis=axes, keepdims=True)
    tile = _per_head(
        lambda numbers, *arrays: tiles.backward(*arrays, keep=_keep(numbers), dot=dot)
    )

    def step(carry, chunk):
        d_state, later = carry
        (q, k, v, g, numbers), state, d_out = chunk
        *out, d_state, later = tile(numbers, q, k, v, g, state, d_out, d_state, later)
        return (d_state, later), out

    (d_state, _), (dq, dk, dv, dg) = jax.lax.scan(
        step, (d_last, later), (chunks, before, split(d_out, how.chunk, heads)), reverse=True
    )
    put = lambda x, like: None if x is None else join(x[:, :, :, None], length, like.dtype)
    dq = join(dq * how.scale, length, q.dtype)
    return dq, put(dk, k), put(dv, v), put(dg, g), d_state.swapaxes(2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)
