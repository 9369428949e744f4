"""FLoRA: a low-rank core space for weights of any number of dimensions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import CONTRACTED, Adapter
from flora_jax.core.errors import PlanError
from flora_jax.core.registry import register
from flora_jax.core.structured import branch
from flora_jax.core.tucker import Tucker


@register(
    "FLoRA",
    family="adapter",
    paper="FLoRA: Low-Rank Core Space for N-dimension",
    arxiv="2405.14739",
    parameters="sum_n I_n J_n + prod_n J_n",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FLoRA(Adapter):
    """``dW = scale * core x_1 A_1 ... x_N A_N``, core ``[J_1..J_N]``, ``A_n [I_n, J_n]``.

    One mode per axis of the kernel as it is stored: 2 for a dense kernel, 3 for an attention
    projection ``(in, heads, head_dim)``, 4 for a convolution ``(kh, kw, in, out)``. Applied lazily
    as the chain of factors, a convolution as 1x1 -> small window -> 1x1; dW is never formed.

    Args:
      ranks: J_n per kernel axis in stored order, or one number for all axes that are not a
        convolution's window.
      window_rank: J of window axes when ``ranks`` is one number (1 on axes of size 1).
      scale: plain factor s; it is not divided by a rank.
      dropout: rate on the branch's input.

    Init: core 0, ``A_n ~ N(0, 1 / (2 J_n))`` (torch ``kaiming_normal_(a=sqrt 3)``). An axis of
    size 1 has no factor. Source: arXiv 2405.14739 and SJTU-DeepVisionLab/FLoRA as read in the
    card; unlike that code groups are supported (its conv breaks) and the update merges.

    >>> import flora_jax as flora
    >>> conv = {"kernel": jnp.ones((3, 3, 64, 128))}
    >>> flora.plan(conv, {"kernel": FLoRA(ranks=(2, 2, 16, 16))}).count
    4108
    """

    ranks: int | tuple[int, ...] = 8
    window_rank: int = 2
    scale: float = 4.0
    dropout: float = 0.0

    kinds = CONTRACTED
    dim_names = {"core": ()}

    def modes(self, spec, shape) -> tuple[int, ...]:
        """J_n for every axis of an unstacked kernel."""
        if isinstance(self.ranks, tuple):
            return self.ranks
        window = len(spec.spatial(shape))
        small = tuple(min(self.window_rank, n) for n in shape[:window])
        return small + tuple(1 if n == 1 else self.ranks for n in shape[window:])

    def check(self, spec, shape):
        super().check(spec, shape)
        modes = self.modes(spec, shape)
        if len(modes) != len(shape):
            raise PlanError(f"ranks={modes} for a kernel with {len(shape)} axes {shape}")
        for axis, (j, n) in enumerate(zip(modes, shape)):
            if not 1 <= j <= n:
                raise PlanError(f"rank {j} of axis {axis} is outside 1..{n} of a kernel {shape}")

    def init(self, key, spec, base):
        modes = self.modes(spec, base.shape)
        train = {"core": jnp.zeros(modes)}
        for axis, (j, n) in enumerate(zip(modes, base.shape)):
            if n > 1:
                draw = jax.random.normal(jax.random.fold_in(key, axis), (n, j))
                train[f"a{axis}"] = draw / math.sqrt(2 * j)
        return train, {}

    def operator(self, params, spec, ctx):
        one = jnp.ones((1, 1))
        factors = tuple(params.get(f"a{axis}", one) for axis in range(len(ctx.shape)))
        update = self.scale * Tucker(params["core"], factors, spec)
        return ctx.base + branch(update, self.dropout, ctx.dropout)
