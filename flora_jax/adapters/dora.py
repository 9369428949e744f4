"""DoRA: weight-decomposed LoRA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.adapters.lora import LoRA
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register
from flora_jax.core.structured import Diag, branch

# Guards a zero column; PEFT has no guard and gives NaN there.
EPS = 1e-12


@register(
    "DoRA",
    family="adapter",
    paper="DoRA: Weight-Decomposed Low-Rank Adaptation",
    arxiv="2402.09353",
    parameters="r(in + out) + out",
    peft="LORA (use_dora)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """``W = (W0 + s a b) diag(m / ||W0 + s a b||)``, one norm and one ``m`` per output.

    The norm carries no gradient, as in the paper's section 4.3 and HF PEFT. It is found without
    forming ``W0 + s a b``: ``||w_j||^2 + 2s sum_r (W0^T a)_jr b_rj + s^2 (b^T (a^T a) b)_jj``.
    A layer's bias stays outside the scaling.

    Trains a, b and m ``[out]`` (initially ``||W0||``); keeps ``norm2 = ||W0||^2`` as a buffer.
    Source: arXiv 2402.09353, HF PEFT ``tuners/lora/dora.py`` (read for the detached norm).
    """

    needs_base = True
    dim_names = {**LoRA.dim_names, "m": ("out",), "norm2": ("out",)}

    def init(self, key, spec, base):
        train, _ = super().init(key, spec, base)
        norm2 = jnp.sum(jnp.square(spec.canonical(base).astype(jnp.float32)), axis=-2)
        return {**train, "m": jnp.sqrt(norm2)}, {"norm2": norm2}

    def norm(self, params, base) -> jax.Array:
        """Column norms ``[out]`` of ``W0 + s a b``; the dense sum is never formed."""
        wide = jnp.float32
        a, b = params["a"].astype(wide), params["b"].astype(wide)
        wa = jnp.einsum("...io,...ir->...ro", base.dense().astype(wide), a)
        cross = jnp.sum(wa * b, axis=-2)
        gram = jnp.einsum("...ir,...is->...rs", a, a)
        own = jnp.einsum("...ro,...rs,...so->...o", b, gram, b)
        norm2 = params["norm2"] + 2 * self.scale * cross + self.scale**2 * own
        return jnp.sqrt(jnp.maximum(norm2, EPS**2))

    def operator(self, params, spec, ctx):
        norm = jax.lax.stop_gradient(self.norm(params, ctx.base))
        update = branch(self.scale * LowRank(params["a"], params["b"]), self.dropout, ctx.dropout)
        return (ctx.base + update) @ Diag(params["m"] / norm)
