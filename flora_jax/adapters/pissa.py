"""PiSSA and OLoRA: LoRA started from a part of the weight itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.adapters.lora import LoRA
from flora_jax.core.errors import PlanError
from flora_jax.core.linalg import svd
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromWeight(LoRA):
    """``W = W0 - s a0 b0 + s a b``: a, b start at a0, b0, which are kept as buffers.

    The base stays untouched unless :func:`flora_jax.rebase` folds ``-s a0 b0`` into it, after
    which the buffers are gone from the tree and the branch for them is no longer computed.
    """

    needs_base = True
    dim_names = {**LoRA.dim_names, "a0": ("in", None), "b0": (None, "out")}

    def factors(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``a0, b0`` of a float32 canonical weight ``[..., in, out]``."""
        raise NotImplementedError

    def check(self, spec, shape):
        super().check(spec, shape)
        if spec.kind == "embedding":
            raise PlanError("factoring a vocabulary-sized table is not supported; use LoRA")

    def init(self, key, spec, base):
        train, _ = super().init(key, spec, base)
        a, b = self.factors(spec.canonical(base).astype(jnp.float32))
        return {**train, "a": a, "b": b}, {"a0": a, "b0": b}

    def operator(self, params, spec, ctx):
        expression = super().operator(params, spec, ctx)
        if "a0" in params:
            expression = expression - self.scale * LowRank(params["a0"], params["b0"])
        return expression

    def rebase(self, base, params, spec):
        rest = {name: array for name, array in params.items() if name not in ("a0", "b0")}
        change = self.scale * jnp.matmul(params["a0"], params["b0"])
        wide = spec.canonical(base).astype(jnp.float32) - change
        return spec.restore(wide, base.shape).astype(base.dtype), rest


@register(
    "PiSSA",
    family="adapter",
    paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation",
    arxiv="2404.02948",
    parameters="r(in + out)",
    peft="LORA (init_lora_weights=pissa)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(_FromWeight):
    """``W0 = U S V^T``; ``a0 = U_r sqrt(S_r / s)``, ``b0 = sqrt(S_r / s) V_r^T``; the rest frozen.

    (Our ``W0`` is ``[in, out]``.) Identity at init. The SVD runs in float32, whatever the weight.
    The sign of each pair is fixed: the largest entry of each column of a0 is positive.
    Source: arXiv 2404.02948, HF PEFT ``pissa_init``.
    """

    def spectrum(self, spec, base):
        """What :func:`flora_jax.spectral_ranks` reads."""
        return svd(spec.canonical(base)).s

    def factors(self, weight):
        top = svd(weight).truncate(self.rank)
        return top._replace(s=top.s / self.scale).split()


@register(
    "OLoRA",
    family="adapter",
    paper="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    arxiv="2406.01775",
    parameters="r(in + out)",
    peft="LORA (init_lora_weights=olora)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(_FromWeight):
    """``W0^T = Q R``; ``b0 = Q_r^T`` (orthonormal rows), ``a0 = R_r^T``.

    The initial branch is ``s a0 b0`` and the base loses the same, so the identity holds for any
    scale (as in HF PEFT, which does not divide the factors by s). ``diag(R) >= 0`` fixes signs.
    Source: arXiv 2406.01775, HF PEFT ``olora_init``.
    """

    def factors(self, weight):
        q, r = jnp.linalg.qr(jnp.swapaxes(weight, -1, -2))
        sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        q, r = q * sign[..., None, :], r * sign[..., :, None]
        return jnp.swapaxes(r[..., : self.rank, :], -1, -2), jnp.swapaxes(
            q[..., : self.rank], -1, -2
        )
