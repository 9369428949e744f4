"""KORE: a low-rank update that the inputs of old knowledge hardly notice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import Adapter, check_rank
from flora_jax.core.errors import PlanError
from flora_jax.core.linalg import SVD, fix_signs, svd
from flora_jax.core.operators import LowRank, transpose
from flora_jax.core.registry import register
from flora_jax.core.structured import branch


@register(
    "KORE",
    family="adapter",
    paper="KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented "
    "Augmentations and Constraints",
    arxiv="2510.19316",
    parameters="r out",
    peft="LORA",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KORE(Adapter):
    """``W = W0 + s a0 (b - b0)``; only b ``[r, out]`` trains, and old inputs have ``x a0 ~ 0``.

    ``C = X^T X = U L U^T`` of calibration inputs ``X [rows, in]``; ``U_r [in, r]`` are the
    eigenvectors of its r smallest eigenvalues, and ``U_r U_r^T W0 = V S Q`` (rank at most r)
    gives the frozen ``a0 = V sqrt(S / s)`` and ``b0 = sqrt(S / s) Q``, where b starts. So a0 lies
    in span(U_r), ``||a0^T C||_F <= l_r ||a0||_F``, and where ``rank(C) <= in - r`` the function on
    the calibration inputs does not change for any b. It starts exactly at W0 and leaves the base
    untouched; the paper writes the same as ``(W0 - a0 b0) + a0 b``, which :func:`flora_jax.rebase`
    gives.

    On a convolution C is that of its patches, in each group; with batch axes that of each batch.
    LoRA-Null (HungerPWAY/LoRA-Null, read in the card) scales X by its largest entry and C by 1/256:
    eigenvectors do not change with a factor. (Were the factor one of each batch, they would; the
    paper has none.) Weight decay pulls b to 0, not to b0: train without it, as the paper does.

    Args:
      rank: r, of the update and of the null space.
      scale: s; the paper has 1.
      dropout: rate on the branch's input.
      train_a: train a too, from a0, as ``W0 + s (a b - a0 b0)``: the paper's ablation and the first
        version of LoRA-Null. The protection is then that of the start only.

    Source: arXiv 2510.19316, sec. 3.2, eq. 1-3 (as transcribed in the method card). Its
    augmentation of the data is not an adapter and not here.

    >>> import flora_jax as flora
    >>> flora.plan({"kernel": jnp.ones((6, 4))}, {"kernel": KORE(rank=2)}).count
    8
    """

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    train_a: bool = False

    kinds = ("dense", "einsum", "conv", "conv_transpose")
    needs_base = True
    statistics = ("gram",)
    dim_names = {"a": ("in", None), "a0": ("in", None), "b": (None, "out"), "b0": (None, "out")}

    def check(self, spec, shape):
        super().check(spec, shape)
        check_rank(self.rank, spec, shape)
        if not self.scale > 0:
            raise PlanError(f"scale={self.scale} must be positive")
        if not 0.0 <= self.dropout < 1.0:
            raise PlanError(f"dropout={self.dropout} is outside [0, 1)")

    def init(self, key, spec, base, stats):
        weight = spec.canonical(base).astype(jnp.float32)
        a0, b0 = self.factors(weight, stats["gram"])
        if self.train_a:
            return {"a": a0, "b": b0}, {"a0": a0, "b0": b0}
        return {"b": b0}, {"a0": a0, "b0": b0}

    def factors(self, weight: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``a0, b0`` of a float32 canonical weight ``[..., in, out]`` and its inputs' gram matrix.

        The largest entry of each column of a0 is positive.
        """
        null = null_space(gram, self.rank)
        times = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
        small = svd(times(transpose(null), weight))
        left, right = fix_signs(times(null, small.u), small.vt)
        return SVD(left, small.s / self.scale, right).split()

    def operator(self, params, spec, ctx):
        started = "b0" in params  # rebase folds the start into the base
        if self.train_a:
            update = LowRank(params["a"], params["b"])
            update = update - LowRank(params["a0"], params["b0"]) if started else update
        else:
            update = LowRank(params["a0"], params["b"] - params["b0"] if started else params["b"])
        return ctx.base + branch(self.scale * update, self.dropout, ctx.dropout)

    def rebase(self, base, params, spec):
        change = self.scale * jnp.matmul(params["a0"], params["b0"])
        wide = spec.canonical(base).astype(jnp.float32) - change
        folded = ("a0", "b0") if self.train_a else ("b0",)
        rest = {name: array for name, array in params.items() if name not in folded}
        return spec.restore(wide, base.shape).astype(base.dtype), rest


def null_space(gram: jax.Array, rank: int) -> jax.Array:
    """Eigenvectors ``[..., in, r]`` of the r smallest eigenvalues of ``gram [..., in, in]``."""
    largest = jnp.max(jnp.abs(gram), axis=(-2, -1), keepdims=True)
    _, vectors = jnp.linalg.eigh(gram / jnp.where(largest > 0, largest, 1.0))
    return vectors[..., :rank]


def captured_energy(gram: jax.Array, rank: int) -> jax.Array:
    """``sum of the r smallest eigenvalues / sum of all``: what of the inputs an update still sees.

    0 is a true null space; ``r / in`` what r random directions would capture of white inputs.

    >>> float(captured_energy(jnp.diag(jnp.array([0.0, 1.0, 3.0])), 2))
    0.25
    """
    values = jnp.maximum(jnp.linalg.eigvalsh(gram), 0.0)
    return values[..., :rank].sum(-1) / jnp.maximum(values.sum(-1), jnp.finfo(values.dtype).tiny)


def hars(
    adaptation: float, retention: float, adaptation_before: float, retention_before: float
) -> float:
    """Harmonic Adaptation-Retention Score of the paper (eq. 4), in per cent.

    ``G = 100 (after - before) / before`` of each; ``f_A = 100 G_A / (G_A + 100)``,
    ``f_R = G_R + 100``; the score is their harmonic mean. What was learned saturates, what was
    forgotten counts in full; 0 where nothing was learned (the paper is silent). Adaptation is the
    mean of the paper's CEM and F1.

    Raises:
      PlanError: a figure before is not positive.

    >>> round(hars(35.96, 40.00, 7.12, 46.74), 2)
    82.8
    """
    if adaptation_before <= 0 or retention_before <= 0:
        raise PlanError(
            f"figures before must be positive, not {adaptation_before} and {retention_before}"
        )
    gained = 100.0 * (adaptation - adaptation_before) / adaptation_before
    kept = 100.0 * retention / retention_before
    if gained <= 0 or kept <= 0:
        return 0.0
    adapted = 100.0 * gained / (gained + 100.0)
    return 2.0 * adapted * kept / (adapted + kept)
