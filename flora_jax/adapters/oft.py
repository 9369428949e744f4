"""OFT: orthogonal fine-tuning with block-diagonal rotations."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.adapter import Adapter, batch_dims, check_divides
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LinearMap
from flora_jax.core.registry import register
from flora_jax.core.structured import BlockDiag, Patchwise, Permute


def skew(entries: jax.Array, size: int) -> jax.Array:
    """Skew-symmetric ``[..., b, b]`` from its upper triangle ``[..., b(b-1)/2]``, row by row."""
    upper = np.triu_indices(size, 1)
    q = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype)
    q = q.at[(..., *upper)].set(entries)
    return q - jnp.swapaxes(q, -1, -2)


def cayley(q: jax.Array) -> jax.Array:
    """``(I + Q)^{-1} (I - Q)``: orthogonal for skew-symmetric ``Q [..., b, b]``."""
    eye = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    return jnp.linalg.solve(eye + q, eye - q)


def cayley_neumann(q: jax.Array, terms: int) -> jax.Array:
    """``I + 2 (Q + ... + Q^{t-2}) + Q^{t-1}``: a series for ``(I + Q)(I - Q)^{-1}`` cut at t terms.

    As in HF PEFT: two terms are ``I + 2Q``, and three give the same as four.
    """
    eye = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    if terms == 2:
        return eye + 2 * q
    power, total = q, eye + 2 * q
    for _ in range(max(terms, 4) - 3):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


@register(
    "OFT",
    family="adapter",
    paper="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    arxiv="2306.07280",
    parameters="blocks b(b-1)/2, blocks b = in (out for an embedding)",
    peft="OFT",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Adapter):
    """``y = (x R) W0``, ``R = blockdiag(R_1 ..)`` orthogonal ``[in, in]``, ``R_i = cayley(Q_i)``.

    ``Q_i [b, b]`` is skew-symmetric with the trained upper triangle ``skew [blocks, b(b-1)/2]``
    (zero at the start: identity). ``neumann_terms=0`` is the exact Cayley transform, orthogonal for
    any Q; n terms are the series of OFTv2, which needs no solve and is orthogonal for small Q only.
    As in HF PEFT the exact form is ``(I - Q)(I + Q)^{-1}`` and the series is that of its inverse
    ``(I + Q)(I - Q)^{-1}``: the same Q turns the other way.

    Args:
      block_size: b; 32 when ``blocks`` is not given either.
      blocks: the number of blocks instead of their size. Give one of the two.
      block_share: one block for all places.
      neumann_terms: of the Cayley-Neumann series; 0 for the exact transform.
      coft: constrained OFT: each Q is scaled back to ``||Q|| <= eps / sqrt(blocks stored)``.
      eps: of ``coft``.
      dropout: share of blocks that are the identity in a training step: ``int(p blocks)`` of them,
        drawn anew each step, no rescaling, not with a shared block. HF PEFT 0.21 defines this
        (``module_dropout``) and never applies it.

    On a convolution the patches are rotated, in torch's order ``(in, kh, kw)``, which is what
    PEFT's merged weight is (its unmerged forward differs for windows above 1x1); patches are
    formed, the rotated kernel is not. On an embedding the features are rotated (``W0 R``), as in
    PEFT. Experts and groups have rotations of their own.

    ``coft`` in PEFT overwrites the parameter by its projection P before each use. Here the array is
    left alone and every use sees ``P(skew)`` with the gradient passed straight through: the first
    step from inside the ball is PEFT's; afterwards the raw array may lie outside, where only its
    direction counts. Files get the projected values.

    Source: arXiv 2306.07280; OFTv2 (input-centric form, Cayley-Neumann) arXiv 2506.19847; HF PEFT
    ``tuners/oft``, followed where they differ.

    >>> import flora_jax as flora
    >>> params = {"kernel": jnp.ones((12, 8))}
    >>> flora.plan(params, {"kernel": OFT(block_size=4)}).count
    18
    """

    block_size: int | None = None
    blocks: int | None = None
    block_share: bool = False
    neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5
    dropout: float = 0.0

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.block_size is not None and self.blocks is not None:
            raise PlanError(
                f"block_size={self.block_size} and blocks={self.blocks}: give one of them"
            )
        n = self._rotated(spec, shape)
        what = "out" if spec.kind == "embedding" else "in"
        if self.blocks is not None:
            check_divides("blocks", self.blocks, n, what)
        else:
            check_divides("block_size", self._size, n, what)
        if self.layout(spec, shape)[1] < 2:
            raise PlanError("a block of size 1 has no rotation; blocks are of size 2 at least")
        if self.neumann_terms < 0 or self.neumann_terms == 1:
            raise PlanError(f"neumann_terms={self.neumann_terms} is neither 0 (exact) nor above 1")
        if self.coft and not self.eps > 0:
            raise PlanError(f"eps={self.eps} must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise PlanError(f"dropout={self.dropout} is outside [0, 1)")

    @property
    def _size(self) -> int:
        return 32 if self.block_size is None else self.block_size

    def _rotated(self, spec, shape) -> int:
        """The size of the axis that is rotated."""
        return spec.canonical_shape(shape)[-1 if spec.kind == "embedding" else -2]

    def layout(self, spec, shape) -> tuple[int, int]:
        """``(blocks, b)`` for an unstacked kernel."""
        n = self._rotated(spec, shape)
        if self.blocks is None:
            return n // self._size, self._size
        return self.blocks, n // self.blocks

    def init(self, key, spec, base):
        blocks, b = self.layout(spec, base.shape)
        stored = 1 if self.block_share else blocks
        return {"skew": jnp.zeros((*batch_dims(spec, base.shape), stored, b * (b - 1) // 2))}, {}

    def project(self, entries: jax.Array) -> jax.Array:
        """Upper triangles ``[.., stored, b(b-1)/2]`` with every Q scaled into coft's ball."""
        limit = self.eps / math.sqrt(entries.shape[-2])
        norm2 = 2 * jnp.sum(jnp.square(entries), axis=-1, keepdims=True)
        outside = norm2 > limit**2
        norm = jnp.sqrt(jnp.where(outside, norm2, 1.0))
        return jnp.where(outside, entries * (limit / norm), entries)

    def rotations(self, entries: jax.Array, blocks: int, size: int) -> jax.Array:
        """``R [.., blocks, b, b]`` from the trained array, in float32."""
        entries = entries.astype(jnp.float32)
        if self.coft:
            entries = entries + jax.lax.stop_gradient(self.project(entries) - entries)
        q = skew(entries, size)
        r = cayley(q) if self.neumann_terms == 0 else cayley_neumann(q, self.neumann_terms)
        return jnp.broadcast_to(r, (*r.shape[:-3], blocks, size, size))

    def _dropped(self, r: jax.Array, key: jax.Array | None) -> jax.Array:
        """Some blocks set to the identity; none where all are one."""
        count = int(self.dropout * r.shape[-3])
        if key is None or self.block_share or count == 0:
            return r
        order = jnp.argsort(jax.random.uniform(key, r.shape[:-2]), axis=-1)
        return jnp.where((order < count)[..., None, None], jnp.eye(r.shape[-1], dtype=r.dtype), r)

    def operator(self, params, spec, ctx):
        blocks, size = self.layout(spec, ctx.shape)
        r = self._dropped(self.rotations(params["skew"], blocks, size), ctx.dropout)
        rotation: LinearMap = BlockDiag(r)
        if spec.kind == "embedding":
            return ctx.base @ rotation
        if spec.kind.startswith("conv"):
            order = torch_order(ctx.shape)
            rotation = Permute(order) @ rotation @ Permute(jnp.argsort(order))
        return Patchwise(rotation) @ ctx.base


def torch_order(shape: tuple[int, ...]) -> jax.Array:
    """Where entry ``(in, *window)`` of a torch patch lies in a patch ``(*window, in)`` of ours."""
    n = len(shape) - 1
    places = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])
    return jnp.asarray(np.moveaxis(places, n - 1, 0).reshape(-1))
