"""NOLA: LoRA factors as linear combinations of frozen random bases."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import PRNG, Adapter, batch_dims, check_rank
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LowRank
from flora_jax.core.registry import register
from flora_jax.core.structured import branch


def basis(key_data: jax.Array, first: jax.Array, count: int, shape: tuple[int, ...]) -> jax.Array:
    """Elements ``first .. first+count`` of a random basis: ``U(-1, 1)``, ``[count, *shape]``.

    Element i depends on the key and i alone, so any chunking or sharding gives the same bits.
    """
    key = jax.random.wrap_key_data(key_data, impl=PRNG)
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-1.0)
    return jax.vmap(draw)(first + jnp.arange(count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def combine(c: jax.Array, key_data: jax.Array, shape: tuple[int, ...], chunk: int) -> jax.Array:
    """``sum_i c_i M_i / sqrt(k)``, ``c [k]``, M regenerated in chunks; memory chunk * |shape|.

    The backward pass draws the basis again: ``dc_i = <g, M_i> / sqrt(k)``.
    """
    k = c.shape[0]
    parts = jnp.pad(c, (0, -k % chunk)).reshape(-1, chunk)

    def add(total, part):
        index, weights = part
        m = basis(key_data, index * chunk, chunk, shape)
        return total + jnp.tensordot(weights, m, 1), None

    zero = jnp.zeros(shape, c.dtype)
    total, _ = jax.lax.scan(add, zero, (jnp.arange(parts.shape[0]), parts))
    return total / math.sqrt(k)


def _forward(c, key_data, shape, chunk):
    return combine(c, key_data, shape, chunk), (c, key_data)


def _backward(shape, chunk, saved, g):
    c, key_data = saved
    k = c.shape[0]

    def project(_, index):
        m = basis(key_data, index * chunk, chunk, shape)
        return None, jnp.tensordot(m, g, len(shape))

    _, parts = jax.lax.scan(project, None, jnp.arange(-(-k // chunk)))
    no_gradient = np.zeros(key_data.shape, jax.dtypes.float0)
    return parts.reshape(-1)[:k].astype(c.dtype) / math.sqrt(k), no_gradient


combine.defvjp(_forward, _backward)


@register(
    "NOLA",
    family="adapter",
    paper="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    arxiv="2310.02556",
    parameters="k + l",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NOLA(Adapter):
    """``dW = (alpha / r) A B``; ``A = A_f + sum_i alpha_i M_i``, ``B = sum_j beta_j N_j``.

    ``M_i [in, r]``, ``N_j [r, out]`` have entries ``U(-1,1) / sqrt(k)`` (``/ sqrt(l)``) drawn from
    ``seed``, the canonical path and the index (threefry, ``fold_in``), rebuilt every step and in
    the backward pass, never stored. Only the mixing coefficients train: their number does not
    depend on the weight's size or on r.

    Args:
      rank, alpha: as in LoRA.
      k, l: number of basis elements for A and B.
      seed: of the bases (and of A_f).
      chunk: basis elements alive at once.
      dropout: rate on the branch's input.
      variant: ``gpt`` (A_f = kaiming-uniform, coefficients 0: identity at init) or ``vit``
        (no A_f, coefficients 1/k and 1/l: NOT the identity at init), the two released forms.

    Source: arXiv 2310.02556; UCDvision/NOLA as read in the card (its 1/sqrt(k) is in the code, not
    in its README). The vit form's shared per-shape seed and KU(sqrt 5) basis are not reproduced.
    """

    rank: int = 8
    alpha: float = 8.0
    k: int = 512
    l: int = 512
    seed: int = 0
    chunk: int = 64
    dropout: float = 0.0
    variant: str = "gpt"

    def check(self, spec, shape):
        super().check(spec, shape)
        check_rank(self.rank, spec, shape)
        if min(self.k, self.l, self.chunk) < 1:
            raise PlanError(f"k={self.k}, l={self.l}, chunk={self.chunk} must be at least 1")
        if self.variant not in ("gpt", "vit"):
            raise PlanError(f"variant={self.variant!r} is not gpt or vit")
        if spec.batched:
            raise PlanError("NOLA is not defined for kernels with batch axes or groups")

    def init(self, key, spec, base):
        start = (0.0, 0.0) if self.variant == "gpt" else (1 / self.k, 1 / self.l)
        return {"alpha": jnp.full(self.k, start[0]), "beta": jnp.full(self.l, start[1])}, {}

    def factors(self, params, spec, ctx) -> tuple[jax.Array, jax.Array]:
        """``A [in, r]`` and ``B [r, out]``."""
        assert not batch_dims(spec, ctx.shape)
        n_in, n_out = spec.canonical_shape(ctx.shape)
        keys = jax.random.split(ctx.basis, 3)
        data = jax.random.key_data(keys)
        chunk = min(self.chunk, self.k), min(self.chunk, self.l)
        a = combine(params["alpha"], data[0], (n_in, self.rank), chunk[0])
        b = combine(params["beta"], data[1], (self.rank, n_out), chunk[1])
        if self.variant == "gpt":
            a = a + kaiming_uniform(keys[2], a.shape, n_in)
        return a, b

    def operator(self, params, spec, ctx):
        update = (self.alpha / self.rank) * LowRank(*self.factors(params, spec, ctx))
        return ctx.base + branch(update, self.dropout, ctx.dropout)
