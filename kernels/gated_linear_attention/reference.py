"""The specification: the recurrence, one token at a time, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference(
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
    """The recurrence; arguments as of :mod:`xla`, ``chunk`` has no meaning here."""
    del chunk
    batch, length, heads, dim = k.shape
    group = q.shape[2] // heads
    f32 = lambda x: jnp.moveaxis(x, 1, 0).astype(jnp.float32)
    queries = f32(q.reshape(batch, length, heads, group, dim)) * scale
    decay = jnp.ones((length, 1, 1, 1)) if g is None else jnp.exp(f32(g))
    keep = jnp.ones((length, 1), bool)
    if segments is not None:
        before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
        keep = jnp.moveaxis(segments == before, 1, 0)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, keep = token
        state = jnp.where(keep[:, None, None, None], decay[..., None] * state, 0.0)
        state = state + k[..., None] * v[..., None, :]
        out = jnp.einsum("bhgk,bhkv->bhgv", q, state, precision="highest")
        return state, out

    state, out = jax.lax.scan(step, state, (queries, f32(k), f32(v), decay, keep))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, length, heads * group, v.shape[-1])
    return out.astype(q.dtype), state
