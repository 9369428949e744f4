"""VeRA: shared frozen random projections with trained scaling vectors."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import PRNG, Adapter
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register
from flora_jax.core.structured import branch


def _rows(key: jax.Array, n: int, rank: int, bound: float) -> jax.Array:
    """``[n, rank]`` uniform; row i depends on the key and i, so smaller layers get slices."""
    draw = lambda i: jax.random.uniform(
        jax.random.fold_in(key, i), (rank,), minval=-bound, maxval=bound
    )
    return jax.vmap(draw)(jnp.arange(n))


@register(
    "VeRA",
    family="adapter",
    paper="VeRA: Vector-based Random Matrix Adaptation",
    arxiv="2310.11454",
    parameters="r + out",
    peft="VERA",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Adapter):
    """``dW = A diag(d) B diag(b)``, ``A [in, r]``, ``B [r, out]`` random, frozen, shared.

    All adapted weights of the model share one random pair; a smaller weight uses its first rows
    and columns. Trains ``d [r]`` (init ``d_initial``) and ``b [out]`` (init 0).

    Args:
      rank: r.
      d_initial: first value of d.
      seed: of the shared projections.
      stored: keep A and B in the tree as frozen arrays ``a0, b0`` (HF-PEFT's
        ``save_projection``; needed for projections drawn elsewhere) instead of redrawing them.
      dropout: rate on the branch's input.

    The entries are ``U(+-sqrt(6 / in))`` and ``U(+-sqrt(6 / r))``: kaiming-uniform with gain
    sqrt 2 as in HF PEFT, with the layer's own ``in`` where PEFT takes the model's largest.
    Source: arXiv 2310.11454 (from memory), HF PEFT ``tuners/vera``.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    stored: bool = False
    dropout: float = 0.0

    shared_basis = True
    dim_names = {"d": (None,), "b": ("out",), "a0": ("in", None), "b0": (None, "out")}

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.rank < 1:
            raise PlanError(f"rank={self.rank} must be at least 1")
        if spec.batched:
            raise PlanError("VeRA is not defined for kernels with batch axes or groups")

    def projections(self, key, n_in: int, n_out: int) -> tuple[jax.Array, jax.Array]:
        """``A [in, r]``, ``B [r, out]`` drawn from a key."""
        ka, kb = jax.random.split(key)
        a = _rows(ka, n_in, self.rank, math.sqrt(6.0 / n_in))
        return a, _rows(kb, n_out, self.rank, math.sqrt(6.0 / self.rank)).T

    def init(self, key, spec, base):
        n_in, n_out = spec.canonical_shape(base.shape)
        train = {"d": jnp.full(self.rank, self.d_initial), "b": jnp.zeros(n_out)}
        if not self.stored:
            return train, {}
        root = jax.random.key(self.seed, impl=PRNG)
        return train, dict(zip(("a0", "b0"), self.projections(root, n_in, n_out)))

    def operator(self, params, spec, ctx):
        if "a0" in params:
            a, b = params["a0"], params["b0"]
        else:
            a, b = self.projections(ctx.basis, *spec.canonical_shape(ctx.shape))
        update = LowRank(a * params["d"], b * params["b"])
        return ctx.base + branch(update, self.dropout, ctx.dropout)
