"""IA3: learned scaling of a layer's outputs or inputs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from flora_jax.core.adapter import Adapter, batch_dims
from flora_jax.core.errors import PlanError
from flora_jax.core.registry import register
from flora_jax.core.structured import Channelwise, Diag


@register(
    "IA3",
    family="adapter",
    paper="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arxiv="2205.05638",
    parameters="out (or in)",
    peft="IA3",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Adapter):
    """``y = (x W0 + bias) * l`` (``scale="output"``) or ``y = (x * l) W0 + bias`` (``"input"``).

    ``l`` starts at 1. Keys and values take the output form, a feed-forward's second projection the
    input form (HF-PEFT's ``feedforward_modules``). A convolution's inputs are its channels.
    Source: arXiv 2205.05638 (id from memory), HF PEFT ``tuners/ia3`` (scales the bias as well).
    """

    scale: str = "output"

    dim_names = {"l": (None,)}

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.scale not in ("output", "input"):
            raise PlanError(f"scale={self.scale!r} is not output or input")
        if self.scale == "input" and (spec.kind == "embedding" or spec.groups > 1):
            raise PlanError("input scaling is not defined for embeddings or grouped convolutions")

    def init(self, key, spec, base):
        *_, n_in, n_out = spec.canonical_shape(base.shape)
        n = n_out if self.scale == "output" else n_in // spec.window(base.shape)
        return {"l": jnp.ones((*batch_dims(spec, base.shape), n))}, {}

    def operator(self, params, spec, ctx):
        if self.scale == "output":
            return ctx.base @ Diag(params["l"])
        return Channelwise(Diag(params["l"]), spec.window(ctx.shape)) @ ctx.base

    def bias(self, params, bias, spec):
        if self.scale == "input":
            return None
        return bias * params["l"].reshape(bias.shape)
