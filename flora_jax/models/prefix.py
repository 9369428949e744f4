"""Attention prefixes: trained keys and values that stand before those of the tokens."""

from __future__ import annotations

import flax.linen as nn

from flora_jax.attention import KeyValuePrefix
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import Prefix


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
