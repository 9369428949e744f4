"""Sparse-linear attention (SLA) as an attention variant."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.masks import Full
from flora_jax.attention.types import Sizes, Variant
from flora_jax.core import ops
from flora_jax.core.leaf import is_leaf
from flora_jax.core.registry import register
from flora_jax.kernels.sla import SLAConfig, branches, sla


@register(
    "SLA",
    family="attention",
    paper="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arxiv="2509.24006",
    parameters="H^2 + H",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SLA(Variant):
    """Softmax over each query block's best key blocks, linear attention for the rest.

    ``o = o_s + o_l kernel + bias`` with ``o_s, o_l`` of ``kernels.sla.branches`` and one
    ``kernel [H, H]``, ``bias [H]`` (both start at 0) per layer, shared by its heads. Blocks are
    chosen by the product of their means, without a gradient. Bidirectional: it cannot generate.

    Args:
      variant: ``paper``, ``sla1`` or ``main``, see ``kernels.sla.SLAConfig``.
      critical: share of key blocks that softmax attends to, at least one block.
      negligible: share that nothing attends to, of ``paper`` only.
      block_q: queries per block.
      block_k: keys per block.
      features: map of the linear branch: ``softmax``, ``elu1`` or ``relu``.

    Raises:
      ConfigError: unknown variant or map, shares outside [0, 1], blocks below 1.

    >>> x = jnp.ones((1, 12, 2, 8))
    >>> params = SLA().init(jax.random.key(0), Sizes(heads=2, kv_heads=2, dim=8, width=16), x.dtype)
    >>> SLA(block_q=4, block_k=4).attend(params, x, x, x, mask=Full())[0].shape
    (1, 12, 2, 8)
    """

    masks: ClassVar = (Full,)
    takes: ClassVar = ("scale",)
    generates: ClassVar = False

    variant: str = SLAConfig.variant
    critical: float = SLAConfig.critical
    negligible: float = SLAConfig.negligible
    block_q: int = SLAConfig.block_q
    block_k: int = SLAConfig.block_k
    features: str = SLAConfig.features

    def __post_init__(self):
        self.config()

    def config(self) -> SLAConfig:
        """These hyper-parameters as the kernel takes them."""
        return SLAConfig(**dataclasses.asdict(self))

    def init(self, key: jax.Array, sizes: Sizes, dtype: Any) -> dict[str, Any]:
        kernel = jnp.zeros((sizes.dim, sizes.dim), dtype)
        return {"proj": {"kernel": kernel, "bias": jnp.zeros(sizes.dim, dtype)}}

    def whole(self, params, q, k, v, call):
        if not any(map(is_leaf, params["proj"].values())):
            return sla(q, k, v, params["proj"], self.config(), scale=call.scale)
        # A leaf (adapted, quantised, observed) sees the tokens, as any other layer's kernel does.
        sparse, low = branches(q, k, v, self.config(), scale=call.scale)
        low = ops.dot(low, params["proj"]["kernel"]) + ops.value(params["proj"]["bias"], low.dtype)
        return (sparse.astype(jnp.float32) + low).astype(q.dtype)
