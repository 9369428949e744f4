"""Hydra: parallel and sequential low-rank branches that merge into one weight."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.adapters.initializers import kaiming_uniform, xavier_uniform
from flora_jax.core.adapter import Adapter, batch_dims, check_rank
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import Compose, Identity, LowRank, Matrix
from flora_jax.core.registry import register
from flora_jax.core.structured import Dropout


@register(
    "Hydra",
    family="adapter",
    paper="Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
    arxiv="2309.06922",
    parameters="r_p(in + out) + 2 r_s out (+ r_p + r_s + 2 out with biases)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hydra(Adapter):
    """``y = f0 + s (x a_p) b_p + s (f0 a_s) b_s`` with ``f0 = x W0 + bias``.

    Merged: ``W = W0 (I + s a_s b_s) + s a_p b_p`` and ``bias + s (bias a_s) b_s``; the layer's bias
    is adapted with the kernel. The sequential branch always reads the base output f0, also beside
    other adapters. On a convolution it is a 1x1.

    Args:
      rank_parallel, rank_sequential: r_p, r_s; 0 drops the branch.
      scale: s.
      dropout: rate between a and b.
      use_bias: biases after a and b of each branch (they merge into the layer's, which must
        exist; with dropout they are not dropped).
      initializer: of the a's: ``kaiming`` (NLU), ``xavier`` (VTAB) or ``normal`` (0.02, ELEVATER).

    Source: arXiv 2309.06922; extremebird/Hydra as read in the card, whose formulas (not its NLU
    flag or VTAB merge, both broken as released) are followed.
    """

    rank_parallel: int = 4
    rank_sequential: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    use_bias: bool = False
    initializer: str = "kaiming"

    dim_names = {
        "parallel_a": ("in", None),
        "parallel_b": (None, "out"),
        "sequential_a": ("out", None),
        "sequential_b": (None, "out"),
        "parallel_c": ("out",),
        "sequential_c": ("out",),
    }

    def _branches(self):
        ranks = {"parallel": self.rank_parallel, "sequential": self.rank_sequential}
        return {name: rank for name, rank in ranks.items() if rank > 0}

    def check(self, spec, shape):
        super().check(spec, shape)
        if not self._branches():
            raise PlanError("rank_parallel and rank_sequential are both 0")
        if self.rank_parallel:
            check_rank(self.rank_parallel, spec, shape, "rank_parallel")
        if not 0 <= self.rank_sequential <= spec.sizes(shape)[2]:
            raise PlanError(
                f"rank_sequential={self.rank_sequential} exceeds {spec.sizes(shape)[2]}"
            )
        if self.initializer not in ("kaiming", "xavier", "normal"):
            raise PlanError(f"initializer={self.initializer!r} is not kaiming, xavier or normal")
        if self.use_bias and spec.kind == "embedding":
            raise PlanError("an embedding has no bias for use_bias to merge into")

    def _draw(self, key, shape):
        n_in, rank = shape[-2:]
        if self.initializer == "normal":
            return 0.02 * jax.random.normal(key, shape)
        if self.initializer == "xavier":
            return xavier_uniform(key, shape, n_in + rank)
        return kaiming_uniform(key, shape, n_in)

    def init(self, key, spec, base):
        batch = batch_dims(spec, base.shape)
        *_, n_in, n_out = spec.canonical_shape(base.shape)
        train = {}
        for i, (name, rank) in enumerate(self._branches().items()):
            first = n_in if name == "parallel" else n_out
            train[f"{name}_a"] = self._draw(jax.random.fold_in(key, i), (*batch, first, rank))
            train[f"{name}_b"] = jnp.zeros((*batch, rank, n_out))
            if self.use_bias:
                train[f"{name}_bias"] = jnp.zeros((*batch, rank))
                train[f"{name}_c"] = jnp.zeros((*batch, n_out))
        return train, {}

    def _branch(self, name, params, key):
        a, b = params[f"{name}_a"], params[f"{name}_b"]
        if key is None or self.dropout == 0.0:
            return self.scale * LowRank(a, b)
        key = jax.random.fold_in(key, name == "parallel")
        return self.scale * Compose(Matrix(a), Dropout(key, self.dropout), Matrix(b))

    def operator(self, params, spec, ctx):
        expression = ctx.base
        if self.rank_sequential:
            n_out = spec.canonical_shape(ctx.shape)[-1]
            branch = self._branch("sequential", params, ctx.dropout)
            expression = expression @ (Identity(n_out) + branch)
        if self.rank_parallel:
            expression = expression + self._branch("parallel", params, ctx.dropout)
        return expression

    def bias(self, params, bias, spec):
        wide = bias.astype(jnp.float32)
        batch = params[f"{next(iter(self._branches()))}_b"].shape[:-2]
        rows = wide.reshape(*batch, 1, -1) if batch else wide.reshape(1, -1)
        if self.rank_sequential:
            change = rows @ params["sequential_a"] @ params["sequential_b"]
        else:
            change = jnp.zeros_like(rows)
        for name in self._branches() if self.use_bias else ():
            inner = params[f"{name}_bias"][..., None, :] @ params[f"{name}_b"]
            change = change + inner + params[f"{name}_c"][..., None, :]
        assert math.prod(change.shape) == bias.size
        return wide + self.scale * change.reshape(bias.shape)
