"""Keys and values of the tokens so far, in arrays of static shape.

A full cache has a slot for every position; a ring of W slots holds the last W positions, position p
in slot ``p % W``. Rows count on their own: where a row's tokens end is known from the positions of
the new ones, so that the arrays are all there is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.attention.types import KeyValuePrefix, Sizes


def init_cache(sizes: Sizes, batch: int, slots: int, dtype: Any) -> dict[str, jax.Array]:
    """No keys and values yet: ``k, v [B, slots, K, H]``."""
    shape = (batch, slots, sizes.kv_heads, sizes.dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write(
    cache: dict[str, jax.Array], k: jax.Array, v: jax.Array, positions: jax.Array
) -> dict[str, jax.Array]:
    """A full cache with new keys and values at their rows' positions.

    Positions past the end of the cache are dropped, never wrapped.
    """
    rows = jnp.arange(k.shape[0])[:, None]
    put = lambda old, new: old.at[rows, positions].set(
        new.astype(old.dtype), mode="drop", unique_indices=True
    )
    return {"k": put(cache["k"], k), "v": put(cache["v"], v)}


def ring_positions(start: jax.Array, slots: int) -> jax.Array:
    """``[B, slots]``: the position that each slot holds when a row's next is ``start [B, 1]``.

    Negative for a slot that holds nothing yet.

    >>> ring_positions(jnp.asarray([[5]]), 4).tolist()
    [[4, 1, 2, 3]]
    """
    last = start - 1
    return last - (last - jnp.arange(slots)) % slots


def write_ring(
    ring: dict[str, jax.Array],
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    valid: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """A ring with the new keys and values ``[B, T, K, H]``, as many of the last as it holds.

    Args:
      valid: ``[B, T]``; padding at the end of a row is left out.
    """
    slots = ring["k"].shape[1]
    rows = jnp.arange(k.shape[0])[:, None]
    count = k.shape[1] if valid is None else valid.sum(axis=1, keepdims=True)
    place = jnp.arange(k.shape[1])
    stays = (place < count) & (place >= count - slots)
    # What does not stay goes past the end, where it is dropped.
    at = jnp.where(stays, positions % slots, slots)
    put = lambda old, new: old.at[rows, at].set(new.astype(old.dtype), mode="drop")
    return {"k": put(ring["k"], k), "v": put(ring["v"], v)}


def join(prefix: KeyValuePrefix, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``k, v [B, S, K, H]`` with the prefix before them: ``[B, P + S, K, H]``."""

    def one(own: jax.Array, x: jax.Array) -> jax.Array:
        own = jnp.broadcast_to(own, (x.shape[0], *own.shape[1:])).astype(x.dtype)
        return jnp.concatenate([own, x], axis=1)

    return one(prefix.k, k), one(prefix.v, v)


def join_mask(prefix: KeyValuePrefix, mask: jax.Array | None, size: int) -> jax.Array | None:
    """A mask over S keys ``[1 or B, ..., S]`` as one over ``P + S``, or None for all of them.

    Every query sees the entries that its row has.

    Args:
      size: S.
    """
    if mask is None and prefix.on is None:
        return None
    count = prefix.k.shape[1]
    if mask is None:
        mask = jnp.ones((prefix.on.shape[0], size), bool)
    lead = mask.shape[:-1]
    on = jnp.ones((1, count), bool) if prefix.on is None else prefix.on.astype(bool)
    on = on.reshape(on.shape[0], *(1,) * (mask.ndim - 2), count)
    lead = (max(lead[0], on.shape[0]), *lead[1:])
    mask = jnp.broadcast_to(mask.astype(bool), (*lead, size))
    return jnp.concatenate([jnp.broadcast_to(on, (*lead, count)), mask], axis=-1)
