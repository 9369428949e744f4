"""SoKA: Kronecker factors started from the Kronecker-product SVD of the weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.adapters.lokr import check_factor, factorization
from flora_jax.core.adapter import Adapter, Params, check_dropout
from flora_jax.core.errors import PlanError
from flora_jax.core.kron import Kron
from flora_jax.core.linalg import svd
from flora_jax.core.registry import register
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import branch

FROZEN = ("left0", "right0")


def rearrange(matrix: jax.Array, m: int, n: int, window: int = 1) -> jax.Array:
    """Van Loan-Pitsianis: ``[(w m p), (n q)] -> [(m n), (w p q)]``; Kronecker sums become low rank.

    >>> a, b = jnp.arange(6.0).reshape(2, 3), jnp.arange(20.0).reshape(4, 5)
    >>> bool(jnp.allclose(rearrange(jnp.kron(a, b), 2, 3), jnp.outer(a, b)))
    True
    """
    *lead, n_in, n_out = matrix.shape
    parts = matrix.reshape(*lead, window, m, n_in // (window * m), n, n_out // n)
    parts = jnp.einsum("...wmpnq->...mnwpq", parts)
    return parts.reshape(*lead, m * n, -1)


@register(
    "SoKA",
    family="adapter",
    paper="Singular Value Decomposition on Kronecker Adaptation for Large Language Model",
    arxiv="2506.15251",
    parameters="r(mn + pq), in = mp, out = nq",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoKA(Adapter):
    """``W = W0 - sum_k A0_k (x) B0_k + sum_k A_k (x) B_k``, ``A [r, m, n]``, ``B [r, p, q]``.

    The Kronecker-product SVD ``W0 = sum_k sigma_k U_k (x) V_k`` (the SVD of :func:`rearrange`)
    gives ``A0_k = sqrt(sigma_k) U_k``, ``B0_k = sqrt(sigma_k) V_k`` for its r largest terms; A and
    B train from there. Identity at init. The base stays untouched, with frozen copies
    ``left0, right0``, unless :func:`flora_jax.rebase` folds them into it (as for PiSSA). A
    convolution's window belongs to B: ``B [r, window * p, q]``.

    Args:
      rank: r, the number of Kronecker terms. :func:`flora_jax.spectral_ranks` finds it from the
        spectrum, by energy or elbow.
      factor: of both dimensions: m (and n) if it divides, else the largest divisor below it; -1 is
        the pair nearest the square root. A prime dimension has m = 1.
      dropout: rate on the trained branch's input.

    The paper's text writes sizes for which its reshape is the identity; the rearrangement that
    makes the stated sum true is used, with in = m p and out = n q. The split of sigma between the
    factors and the pruning fraction of :func:`prune` are inferred: no code was released.
    Source: arXiv 2506.15251.

    >>> import flora_jax as flora
    >>> shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    >>> flora.plan({"kernel": shape}, {"kernel": SoKA(rank=1)}).count
    8192
    """

    rank: int = 8
    factor: int = -1
    dropout: float = 0.0

    needs_base = True

    def sizes(self, spec: KernelSpec, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(m, n, window)`` of an unstacked kernel."""
        *_, n_in, n_out = spec.canonical_shape(shape)
        window = spec.window(shape)
        m, _ = factorization(n_in // window, self.factor)
        n, _ = factorization(n_out, self.factor)
        return m, n, window

    def check(self, spec, shape):
        super().check(spec, shape)
        check_factor(self.factor, "factor")
        check_dropout(self.dropout, spec)
        *_, n_in, n_out = spec.canonical_shape(shape)
        m, n, _ = self.sizes(spec, shape)
        most = min(m * n, n_in * n_out // (m * n))
        if not 1 <= self.rank <= most:
            raise PlanError(
                f"rank={self.rank} is outside 1..{most} of a {n_in}x{n_out} weight in "
                f"{m}x{n} blocks"
            )

    def rearranged(self, spec: KernelSpec, base: jax.Array) -> jax.Array:
        """The matrix whose SVD is the weight's Kronecker-product SVD, ``[*B, m n, w p q]``."""
        matrix = spec.canonical(base).astype(jnp.float32)
        return rearrange(matrix, *self.sizes(spec, base.shape))

    def spectrum(self, spec, base):
        """What :func:`flora_jax.spectral_ranks` reads."""
        return svd(self.rearranged(spec, base)).s

    def init(self, key, spec, base):
        m, n, window = self.sizes(spec, base.shape)
        *batch, n_in, n_out = spec.canonical_shape(base.shape)
        a, b = svd(self.rearranged(spec, base)).truncate(self.rank).split()
        left = jnp.swapaxes(a, -1, -2).reshape(*batch, self.rank, m, n)
        right = b.reshape(*batch, self.rank, n_in // m, n_out // n)
        return {"left": left, "right": right}, {"left0": left, "right0": right}

    def operator(self, params, spec, ctx):
        window = spec.window(ctx.shape)
        update = Kron(params["left"], params["right"], window)
        expression = ctx.base + branch(update, self.dropout, ctx.dropout)
        if "left0" in params:
            expression = expression - Kron(params["left0"], params["right0"], window)
        return expression

    def rebase(self, base, params, spec):
        rest = {name: array for name, array in params.items() if name not in FROZEN}
        change = Kron(params["left0"], params["right0"], spec.window(base.shape)).dense()
        wide = spec.canonical(base).astype(jnp.float32) - change
        return spec.restore(wide, base.shape).astype(base.dtype), rest


def prune(params: Params, fraction: float) -> Params:
    """Set the weak Kronecker terms of one SoKA weight to zero; pure, jit-able, shapes unchanged.

    A term goes when ``|A_k|_F |B_k|_F`` is below ``fraction`` of the largest of its weight. Both of
    its factors become zero, so its gradient is zero from then on and it stays pruned. Call it
    between training steps, on ``adapters[path]``.

    Args:
      params: ``left [..., k, m, n]``, ``right [..., k, p, q]`` and whatever else, kept as it is.
    """
    norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32)), axis=(-1, -2)))
    size = norm(params["left"]) * norm(params["right"])
    keep = size >= fraction * jnp.max(size, axis=-1, keepdims=True)
    cut = lambda a: jnp.where(keep[..., None, None], a, jnp.zeros_like(a))
    return {**params, "left": cut(params["left"]), "right": cut(params["right"])}


def terms(params: Params) -> jax.Array:
    """How many Kronecker terms of a weight are not zero, ``[...]`` over its stack."""
    alive = lambda name: jnp.any(params[name] != 0, axis=(-1, -2))
    return jnp.sum(alive("left") & alive("right"), axis=-1)
