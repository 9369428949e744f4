"""Replace: train a leaf itself."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from flora_jax.core.adapter import CONTRACTED, Adapter
from flora_jax.core.operators import Matrix
from flora_jax.core.registry import register


@register(
    "Replace",
    family="adapter",
    paper="full fine-tuning of chosen leaves",
    arxiv="",
    parameters="size of the leaf",
    peft="modules_to_save, bias, LN_TUNING",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Replace(Adapter):
    """Train the whole leaf: norms, biases, heads, or with ``".*"`` everything.

    Args:
      dtype: of the trained copy; the leaf's own when empty.

    The trained copy starts at the base's value and stands in its place; merging is copying.
    """

    dtype: str = ""

    kinds = (*CONTRACTED, "vector", "other")
    needs_base = True
    dim_names = {"value": ("kernel",)}

    def init(self, key, spec, base):
        return {"value": jnp.asarray(base, jnp.dtype(self.dtype) if self.dtype else base.dtype)}, {}

    def operator(self, params, spec, ctx):
        # Only reached beside other adapters on the same weight: the change is dense by nature.
        return ctx.base + Matrix(spec.canonical(params["value"]) - ctx.base.dense())

    def value(self, params):
        return params["value"]
