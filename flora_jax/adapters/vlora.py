"""VLoRA: low-rank weights made from each example's image features."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flora_jax.adapters import perceptual
from flora_jax.core import paths
from flora_jax.core.adapter import Adapter, Params, check_rank
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LowRank
from flora_jax.core.plan import Entry
from flora_jax.core.registry import register


@register(
    "VLoRA",
    family="adapter",
    paper="Visual Perception by Large Language Model's Weights",
    arxiv="2405.20339",
    parameters="generator a weight type + n r out",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VLoRA(Adapter):
    """``W_b = W0 + (alpha / r) A[b] B``: ``A [in, r]`` is generated from the features of row b.

    Features ``v [N, P, d_v]`` come with the batch (``"example"``; ``flora.bind(example=)``) and
    become ``z = v W_v + b_v + pos`` once. Each weight type (canonical path: q_proj, k_proj ...) has
    a generator: a query per layer, pre-norm decoder layers (self-attention, cross-attention to z,
    GELU FFN), LayerNorm and one head to ``[in, r]``. B ``[r, out]`` is trained per layer and does
    not depend on the image; it starts at 0, so the start is the identity for any image. Trained
    arrays are float32, the generator computes in the features' dtype. The factors do not depend on
    the text: bind once, decode many tokens.

    Args:
      rank, alpha: of the update; ``alpha=0`` stands for ``alpha = rank``.
      tokens, features: P and d_v of the features.
      width, depth, heads: d, N and the attention heads of the generator.
      ratio: width of its FFN over d.
      skip: of a scanned stack only layers with ``(index + 1) % skip == 0`` get weights; the others'
        are zeros that nothing is generated for (the scan still multiplies by them). In an unrolled
        model choose the layers by the rules instead.

    Raises:
      PlanError: a kernel with batch axes or groups; heads that do not divide the width; ``skip``
        without a stack or larger than it.

    Source: arXiv 2405.20339 and FeipengMa6/VLoRA as read in the card. Its path ``m``, parallel to
    a whole MLP, is not the update of any one kernel and is left out. Its D -> D updates are
    generalised to in -> out (grouped-query keys and values). Rank 64, 16 heads and the FFN ratio
    were seen; d=512, N=8, skip 4 and CLIP-L/14-336 features are from memory.
    """

    rank: int = 64
    alpha: float = 0.0
    tokens: int = 576
    features: int = 1024
    width: int = 512
    depth: int = 8
    heads: int = 16
    ratio: int = 4
    skip: int = 1

    whole_stack = True  # b has a row for each layer that gets weights, not for every layer
    pooled = True
    per_example = True
    dim_names = {"b": (None, None, "out")}

    def check(self, spec, shape):
        super().check(spec, shape)
        check_rank(self.rank, spec, shape)
        if spec.batched:
            raise PlanError("VLoRA is not defined for kernels with batch axes or groups")
        sizes = dataclasses.astuple(self.sizes)
        if min(sizes) < 1 or self.width % self.heads:
            raise PlanError(f"heads={self.heads} must divide width={self.width}, sizes be positive")
        if self.skip < 1 or (self.skip > 1 and spec.stack_ndim != 1):
            raise PlanError(f"skip={self.skip} counts the layers of one scanned stack; use rules")

    @property
    def sizes(self) -> perceptual.Sizes:
        """The generator's sizes."""
        return perceptual.Sizes(
            self.tokens, self.features, self.width, self.depth, self.heads, self.ratio
        )

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return (self.alpha or self.rank) / self.rank

    def _served(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """The stack of the layers that get weights."""
        if self.skip == 1:
            return stack
        if stack[0] < self.skip:
            raise PlanError(f"skip={self.skip} leaves none of {stack[0]} layers")
        return (stack[0] // self.skip,)

    def _placed(self, array: jax.Array, layers: int) -> jax.Array:
        """``[n, ...]`` of the served layers as ``[L, ...]``, zeros elsewhere."""
        if self.skip == 1:
            return array
        out = jnp.zeros((layers, *array.shape[1:]), array.dtype)
        return out.at[self.skip - 1 :: self.skip].set(array)

    def init(self, key, spec, base):
        stack = spec.stack_shape(base.shape)
        _, n_out = spec.unstacked().canonical_shape(base.shape[len(stack) :])
        return {"b": jnp.zeros((*self._served(stack), self.rank, n_out))}, {}

    def pool(self, key, entries):
        train = perceptual.init_visual(jax.random.fold_in(key, 0), self.sizes)
        for name, members in weight_types(entries).items():
            queries = sum(math.prod(self._served(e.stack)) for e in members)
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            n_in = _inputs(members[0])
            made = perceptual.init_generator(own, self.sizes, queries, n_in, self.rank)
            train |= {f"{name}:{part}": array for part, array in made.items()}
        return train, {}

    def generate(self, pool, features, entries):
        expected = (self.tokens, self.features)
        if features.ndim != 3 or features.shape[1:] != expected:
            raise PlanError(f"example {features.shape} is not [rows, tokens, features] {expected}")
        z = perceptual.visual_tokens(pool, features)
        out = {}
        for name, members in weight_types(entries).items():
            start = f"{name}:"
            own = {n.removeprefix(start): a for n, a in pool.items() if n.startswith(start)}
            a = perceptual.generate_factors(own, z, self.heads, self.rank)
            a, first = jnp.moveaxis(a, 1, 0), 0
            for entry in members:
                stack = self._served(entry.stack)
                count = math.prod(stack)
                mine = a[first : first + count].reshape(*stack, *a.shape[1:])
                out[entry.path] = {"a": self._placed(mine, entry.stack[0]) if stack else mine}
                first += count
        return out

    def spread(self, params: Params, spec, base):
        stack = spec.stack_shape(base.shape)
        return {"b": self._placed(params["b"], stack[0]) if stack else params["b"]}

    def operator(self, params, spec, ctx):
        return ctx.base + self.scale * LowRank(params["a"], params["b"])


def weight_types(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Weights that share a generator: equal canonical path and input size, in the blocks' order."""
    types: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (paths.block_indices(e.path), e.path)):
        n_in = _inputs(entry)
        parts = paths.canonical(entry.path).split("/")
        name = ".".join(parts[:-1] if len(parts) > 1 else parts)
        if name in types and _inputs(types[name][0]) != n_in:
            name = f"{name}.{n_in}"
        types.setdefault(name, []).append(entry)
    return types


def _inputs(entry: Entry) -> int:
    return entry.spec.unstacked().canonical_shape(entry.kernel_shape)[0]
