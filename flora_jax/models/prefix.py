"""Attention prefixes: trained keys and values that stand before those of the tokens."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import Prefix


class KeyValuePrefix(NamedTuple):
    """Keys and values ``[1 or B, P, K, H]``; ``on [B, P]`` which a row has, None for all."""

    k: jax.Array
    v: jax.Array
    on: jax.Array | None


def pair(
    module: nn.Module, k: Prefix | None, v: Prefix | None, heads: int
) -> KeyValuePrefix | None:
    """The prefixes of a key and a value projection as one; None when there is none.

    Args:
      module: the attention, for messages.

    Raises:
      PlanError: only one of them has a prefix, or their lengths differ.
    """
    if k is None and v is None:
        return None
    where = "/".join(module.path)
    if k is None or v is None:
        has, lacks = ("value", "key") if k is None else ("key", "value")
        raise PlanError(
            f"{where}: the {has} projection has a prefix, the {lacks} projection has none; give "
            "both the same PrefixTuning"
        )
    if k.values.shape != v.values.shape:
        raise PlanError(
            f"{where}: {k.values.shape[-2]} prefix keys and {v.values.shape[-2]} prefix values"
        )
    split = lambda x: x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return KeyValuePrefix(split(k.values), split(v.values), k.on)


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
    on = jnp.ones((1, count), bool) if prefix.on is None else prefix.on
    on = on.reshape(on.shape[0], *(1,) * (mask.ndim - 2), count)
    lead = (max(lead[0], on.shape[0]), *lead[1:])
    mask = jnp.broadcast_to(mask.astype(bool), (*lead, size))
    return jnp.concatenate([jnp.broadcast_to(on, (*lead, count)), mask], axis=-1)
