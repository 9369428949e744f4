"""The attention variant of a configuration in its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_jax.attention import Softmax, Variant, from_json

KEY = "flora_attention"


def read_attention(config: Mapping[str, Any]) -> dict[str, Variant]:
    """The ``attention`` field of a ``config.json``, if it speaks of one."""
    return {"attention": from_json(config[KEY])} if KEY in config else {}


def write_attention(variant: Variant) -> dict[str, Any]:
    """What :func:`read_attention` reads; nothing for the attention of Hugging Face's classes."""
    return {} if variant == Softmax() else {KEY: variant.to_json()}
