"""MiSS (first called Bone): one small block shared by many shards of the weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import Adapter, batch_dims, check_divides
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import Compose, Identity, LinearMap, Matrix
from flora_jax.core.registry import register
from flora_jax.core.shards import Fold, Shards
from flora_jax.core.structured import BlockDiag, Patchwise, branch

# Above this condition number of I + B, float32 keeps fewer than three digits of the weight.
WORST_CONDITION = 1e4


@register(
    "MiSS",
    family="adapter",
    paper="MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
    arxiv="2409.15371",
    parameters="r out (mini: r m)",
    peft="MISS",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(Adapter):
    """``y = x W0 + (sum of the input's shards) D``: one block for all shards of one axis.

    ``share="in"`` (default): ``D [r, out]``, row k of dW is row ``k mod r`` of D: the shards of
    length r of an input are summed, then there is a single product, cheaper than LoRA's two. Where
    r does not divide ``in`` the last shard is padded with zeros. ``share="out"`` (the paper's first
    form, its eq. 2-3): ``D [in, r]``, the outputs are cut into r runs and all outputs of a run get
    the same update; runs differ by at most one where r does not divide ``out`` (inferred: the paper
    leaves their sizes open). dW has rank at most r, and no saddle at zero: the gradient of D is not
    zero at the start. There is no scale.

    Args:
      rank: r, the length of a shard (``share="in"``) or the number of runs (``"out"``).
      share: which axis of the weight shares.
      mini_r: m: ``D [r, m]`` is repeated ``out / m`` times along the outputs; 0 for no repetition.
      initializer: ``zeros`` (identity) or ``kaiming`` (``U(+-1/sqrt(last axis in torch))``).
      dropout: rate on the branch's input (not for embeddings).

    The inputs of a convolution are its window times its channels in that order (HF PEFT has linear
    layers only); experts and groups have blocks of their own; an embedding's row id takes row
    ``id mod r``.

    Source: arXiv 2409.15371 (v12: section 4.2 is the default form) and HF PEFT ``tuners/miss``,
    whose slices of length r are followed, not the paper's prose "r blocks of size k / r". The
    weight-guided form of the earlier versions is :class:`Bone`.

    >>> import flora_jax as flora
    >>> params = {"kernel": jnp.ones((12, 8))}
    >>> flora.plan(params, {"kernel": MiSS(rank=4)}).count
    32
    """

    rank: int = 64
    share: str = "in"
    mini_r: int = 0
    initializer: str = "zeros"
    dropout: float = 0.0

    dim_names = {"block": (None, "out"), "mini": (None, None), "rows": ("in", None)}

    def check(self, spec, shape):
        super().check(spec, shape)
        _, n_in, n_out = spec.sizes(shape)
        if self.share not in ("in", "out"):
            raise PlanError(f"share={self.share!r} is not in or out")
        shared = n_in if self.share == "in" else n_out
        if not 1 <= self.rank <= shared:
            raise PlanError(f"rank={self.rank} is outside 1..{shared}, the {self.share}put size")
        if self.initializer not in ("zeros", "kaiming"):
            raise PlanError(f"initializer={self.initializer!r} is not zeros or kaiming")
        if not 0.0 <= self.dropout < 1.0:
            raise PlanError(f"dropout={self.dropout} is outside [0, 1)")
        if spec.kind == "embedding" and self.dropout > 0:
            raise PlanError("an embedding's branch takes no dropout")
        if self.mini_r and self.share == "out":
            raise PlanError("mini_r repeats along the outputs, which share='out' shares already")
        if self.mini_r:
            check_divides("mini_r", self.mini_r, n_out, "out")

    def init(self, key, spec, base):
        batch = batch_dims(spec, base.shape)
        *_, n_in, n_out = spec.canonical_shape(base.shape)
        if self.share == "out":
            name, shape, fan = "rows", (n_in, self.rank), n_in
        else:
            name, fan = ("mini", self.mini_r) if self.mini_r else ("block", n_out)
            shape = (self.rank, fan)
        if self.initializer == "zeros":
            return {name: jnp.zeros((*batch, *shape))}, {}
        return {name: kaiming_uniform(key, (*batch, *shape), fan)}, {}

    def update(self, params, n_in: int, n_out: int) -> LinearMap:
        """dW as a map."""
        if self.share == "out":
            return Compose(Matrix(params["rows"]), Fold(n_out, self.rank, runs=True, spread=True))
        if self.mini_r:
            repeat = Fold(n_out, self.mini_r, spread=True)
            return Compose(Shards(params["mini"], n_in), repeat)
        return Shards(params["block"], n_in)

    def operator(self, params, spec, ctx):
        *_, n_in, n_out = spec.canonical_shape(ctx.shape)
        return ctx.base + branch(self.update(params, n_in, n_out), self.dropout, ctx.dropout)


@register(
    "Bone",
    family="adapter",
    paper="Bone: Block-Affine Adaptation of Large Language Models (MiSS, earlier versions)",
    arxiv="2409.15371",
    parameters="r out (row) or r in (col)",
    peft="MISS (init_weights=bat)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bone(Adapter):
    """``W[i, o] = (I + B_g) W0[i, o] + B_g``: weight-guided block affine (``bat``).

    The weight is cut into ``r x r`` blocks ``W0[i, o]``, i over the inputs' blocks, o over the
    outputs'. ``group="row"`` (HF PEFT's ``bat``): ``B [out/r, r, r]``, g = o. ``group="col"`` (the
    authors' RWKV-PEFT): ``B [in/r, r, r]``, g = i. Zero at the start; of full rank in general.

    The column form is lazy: block-diagonal on the input before the base, plus the block sums. The
    row form applies each output block's own map to the whole input, so it needs W each step (not
    each token): the adapted weight ``[in, out]`` is formed, and its gradient too.

    Args:
      rank: r, the side of a block; it divides ``in`` and ``out``.
      group: which axis shares a block with all blocks of the other.

    Not for embeddings, whose vocabulary has no blocks. Blocks of a convolution cut its window times
    its channels in that order; the column form makes patches of its input. B is the transpose of
    PEFT's.

    Source: arXiv 2409.15371 up to the versions named Bone; HF PEFT ``tuners/miss``
    (``get_delta_weight``); the column form as in JL-er/RWKV-PEFT (read in the card).
    """

    rank: int = 64
    group: str = "row"

    kinds = ("dense", "einsum", "conv", "conv_transpose")

    def check(self, spec, shape):
        super().check(spec, shape)
        _, n_in, n_out = spec.sizes(shape)
        if self.group not in ("row", "col"):
            raise PlanError(f"group={self.group!r} is not row or col")
        check_divides("rank", self.rank, n_in, "in")
        check_divides("rank", self.rank, n_out, "out")

    def init(self, key, spec, base):
        *batch, n_in, n_out = spec.canonical_shape(base.shape)
        n = (n_out if self.group == "row" else n_in) // self.rank
        return {"blocks": jnp.zeros((*batch, n, self.rank, self.rank))}, {}

    def _cut(self, matrix: jax.Array) -> jax.Array:
        """``[.., in, out]`` as blocks ``[.., in/r, r, out/r, r]``."""
        *batch, n_in, n_out = matrix.shape
        r = self.rank
        return matrix.reshape(*batch, n_in // r, r, n_out // r, r)

    def _times(self, b: jax.Array, cut: jax.Array) -> jax.Array:
        letter = "o" if self.group == "row" else "i"
        return jnp.einsum(f"...{letter}ps,...isoq->...ipoq", b, cut)

    def _wide(self, b: jax.Array) -> jax.Array:
        """The blocks ``[.., g, p, q]`` shaped to add to ``[.., i, p, o, q]``."""
        if self.group == "row":
            return jnp.moveaxis(b, -3, -2)[..., None, :, :, :]
        return b[..., :, :, None, :]

    def operator(self, params, spec, ctx):
        b = params["blocks"]
        if self.group == "row":
            cut = self._cut(ctx.base.dense().astype(jnp.promote_types(b.dtype, jnp.float32)))
            new = cut + self._times(b, cut) + self._wide(b)
            return Matrix(new.reshape(spec.canonical_shape(ctx.shape)))
        *_, n_in, n_out = spec.canonical_shape(ctx.shape)
        sums = Compose(
            Patchwise(BlockDiag(b)), Fold(n_in, self.rank), Fold(n_out, self.rank, spread=True)
        )
        return Patchwise(Identity(n_in) + BlockDiag(b)) @ ctx.base + sums

    def unmerge(self, kernel, params, spec) -> jax.Array:
        """The base weight of a merged one: ``W0[i, o] = (I + B_g)^{-1} (W[i, o] - B_g)``.

        Args:
          kernel: the merged weight as stored, stack axes included; concrete.
          params: ``{"blocks": ...}`` as they were merged.
          spec: of the stored weight.

        Raises:
          PlanError: some ``I + B_g`` is too close to singular for float32; keep W0 instead.
        """
        b = jnp.asarray(params["blocks"], jnp.float32)
        eye = jnp.eye(self.rank)
        worst = float(np.max(np.linalg.cond(np.asarray(eye + b, np.float64))))
        if not worst <= WORST_CONDITION:
            raise PlanError(
                f"I + B has condition number {worst:.3g}, above {WORST_CONDITION:.0g}: the merge "
                "cannot be undone in float32; keep the base weight"
            )
        inner = spec.unstacked()

        def undo(kernel, b):
            cut = self._cut(inner.canonical(kernel).astype(jnp.float32))
            cut = self._times(jnp.linalg.inv(eye + b), cut - self._wide(b))
            matrix = cut.reshape(inner.canonical_shape(kernel.shape))
            return inner.restore(matrix, kernel.shape).astype(kernel.dtype)

        for _ in range(spec.stack_ndim):
            undo = jax.vmap(undo)
        return undo(jnp.asarray(kernel), b)
