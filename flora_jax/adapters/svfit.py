"""SVFit: train the singular values of a weight."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from flora_jax.core.adapter import Adapter, check_rank
from flora_jax.core.linalg import svd
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register


@register(
    "SVFit",
    family="adapter",
    paper="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular "
    "Values",
    arxiv="2409.05926",
    parameters="r",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SVFit(Adapter):
    """``y = x W0 + ((x u) (s - s0)) vt``, ``u [in, r]``, ``s, s0 [r]``, ``vt [r, out]``.

    ``W0 = U S V^T``; only the r largest singular values ``s`` train, from ``s0``. This is the
    paper's ``W_e + U_r diag(s) V_r^T`` with the residual ``W_e`` left inside an untouched W0, so
    the start is the identity to the last bit and low-bit bases work.

    ``u``, ``vt`` and ``s0`` (float32) are frozen arrays of the adapter and lie in its checkpoint:
    a restored adapter is the same change of the weight whatever SVD routine or sign made it, also
    where equal or zero singular values leave the vectors arbitrary. That W0 is the same is what
    the checkpoint's fingerprint of the base says.

    Args:
      rank: r; 0 is the full ``min(in, out)`` (the paper's setting, inferred from its counts).
        :func:`flora_jax.spectral_ranks` finds the r that keeps a share of each weight's spectrum.

    Source: arXiv 2409.05926 (no released code found). Not SVFT (2405.19597).

    >>> import flora_jax as flora
    >>> flora.plan({"kernel": jnp.ones((6, 4))}, {"kernel": SVFit()}).count
    4
    """

    rank: int = 0

    needs_base = True
    dim_names = {"s": (None,), "s0": (None,), "u": ("in", None), "vt": (None, "out")}

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.rank != 0:
            check_rank(self.rank, spec, shape)

    def spectrum(self, spec, base):
        """What :func:`flora_jax.spectral_ranks` reads."""
        return svd(spec.canonical(base)).s

    def init(self, key, spec, base):
        matrix = spec.canonical(base)
        u, s, vt = svd(matrix).truncate(self.rank or min(matrix.shape[-2:]))
        return {"s": s}, {"s0": s, "u": u, "vt": vt}

    def operator(self, params, spec, ctx):
        change = params["s"] - jnp.asarray(params["s0"], params["s"].dtype)
        return ctx.base + LowRank(params["u"], change[..., :, None] * params["vt"])
