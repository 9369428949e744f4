"""LoRA and rsLoRA."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import Adapter, batch_dims, check_rank
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register
from flora_jax.core.structured import branch


@register(
    "LoRA",
    family="adapter",
    paper="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
    parameters="r(in + out)",
    peft="LORA",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """``y = x W0 + s (dropout(x) a) b``, ``a [in, r]``, ``b [r, out]``, ``s = alpha / r``.

    rsLoRA (arXiv 2312.03732): ``rslora=True`` gives ``s = alpha / sqrt(r)``. On a convolution
    ``a`` is a convolution of the same window into r channels and ``b`` a 1x1; on an embedding
    ``a`` is a table of r columns.

    Args:
      rank: r.
      alpha: numerator of the scale.
      rslora: divide by sqrt(r) instead of r.
      dropout: rate on the branch's input (not for embeddings).
      use_bias: train a bias beside b (HF-PEFT's ``lora_bias``); the layer must have one.
      initializer: ``kaiming`` (U(+-1/sqrt(in)), the papers' code) or ``gaussian`` (N(0, 1/r^2)).

    Source: arXiv 2106.09685; init as in microsoft/LoRA and HF PEFT (embedding: a 0, b N(0,1)).

    >>> import flora_jax as flora
    >>> params = {"kernel": jnp.ones((6, 4))}
    >>> plan = flora.plan(params, {"kernel": LoRA(rank=2)})
    >>> plan.count
    20
    """

    rank: int = 8
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    use_bias: bool = False
    initializer: str = "kaiming"

    dim_names = {"a": ("in", None), "b": (None, "out"), "bias": ("out",)}

    @property
    def scale(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self, spec, shape):
        super().check(spec, shape)
        check_rank(self.rank, spec, shape)
        if not 0.0 <= self.dropout < 1.0:
            raise PlanError(f"dropout={self.dropout} is outside [0, 1)")
        if self.initializer not in ("kaiming", "gaussian"):
            raise PlanError(f"initializer={self.initializer!r} is not kaiming or gaussian")
        if spec.kind == "embedding" and (self.dropout > 0 or self.use_bias):
            raise PlanError("an embedding's branch takes neither dropout nor a bias")

    def init(self, key, spec, base):
        batch = batch_dims(spec, base.shape)
        *_, n_in, n_out = spec.canonical_shape(base.shape)
        a_shape, b_shape = (*batch, n_in, self.rank), (*batch, self.rank, n_out)
        if spec.kind == "embedding":
            train = {"a": jnp.zeros(a_shape), "b": jax.random.normal(key, b_shape)}
        elif self.initializer == "gaussian":
            train = {"a": jax.random.normal(key, a_shape) / self.rank, "b": jnp.zeros(b_shape)}
        else:
            train = {"a": kaiming_uniform(key, a_shape, n_in), "b": jnp.zeros(b_shape)}
        if self.use_bias:
            train["bias"] = jnp.zeros((math.prod(batch) * n_out,))
        return train, {}

    def operator(self, params, spec, ctx):
        update = self.scale * LowRank(params["a"], params["b"])
        return ctx.base + branch(update, self.dropout, ctx.dropout)

    def bias(self, params, bias, spec):
        if "bias" not in params:
            return None
        return bias + self.scale * params["bias"].reshape(bias.shape)
