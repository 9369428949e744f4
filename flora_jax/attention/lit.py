"""LiT: ReLU linear attention with few heads and a depth-wise convolution of the values."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.grid import add_patches, draw_conv, patches
from flora_jax.attention.linear import read, repeat_heads, sums
from flora_jax.attention.masks import Full
from flora_jax.attention.types import Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError
from flora_jax.core.registry import register


@register(
    "LiT",
    family="attention",
    paper="LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation",
    arxiv="2501.12976",
    parameters="window^2 C + C",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiT(Variant):
    """``o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j) + eps) + DWConv(v)_i``.

    ``phi = relu``; the convolution ``[window, window, 1, C]`` runs over the grid of patches with
    zeros outside. Bidirectional. The paper takes fewer heads than the softmax model has (2 for 6,
    4 for 16): that is ``num_attention_heads`` of the model. Sums in float32.

    Args:
      window: side of the convolution, odd; 0 leaves it out (plain ReLU linear attention).
      eps: added to the normaliser: a query whose features are all zero gives DWConv alone.

    >>> LiT(window=0).attend({}, *[jnp.ones((1, 4, 2, 8))] * 3, mask=Full())[0].shape
    (1, 4, 2, 8)
    """

    masks: ClassVar = (Full,)
    generates: ClassVar = False

    window: int = 5
    eps: float = 1e-6

    def __post_init__(self):
        if self.window < 0 or (self.window and self.window % 2 == 0):
            raise ConfigError(f"LiT.window={self.window} must be odd, or 0 for no convolution")

    @property
    def takes(self) -> tuple[str, ...]:
        """A grid of patches has no padding."""
        return () if self.window else ("valid",)

    @property
    def needs(self) -> tuple[str, ...]:
        """The grid, for the convolution."""
        return ("grid",) if self.window else ()

    def init(self, key, sizes, dtype):
        if not self.window:
            return {}
        shape = (self.window, self.window, 1, sizes.heads * sizes.dim)
        return {"depthwise": draw_conv(key, shape, dtype)}

    def whole(self, params, q, k, v, call):
        wide = lambda x: x.astype(jnp.float32)
        fq, fk = jax.nn.relu(wide(q)), jax.nn.relu(wide(k))
        if call.valid is not None:
            fk = jnp.where(call.valid.astype(bool)[..., None, None], fk, 0)
        out, norm = read(fq, sums(fk, wide(v)))
        out = out / (norm + self.eps)[..., None]
        if self.window:
            out = add_patches(out, self._local(params["depthwise"], v, q.shape[2], call))
        return out.astype(q.dtype)

    def _local(self, params, v, heads, call):
        values = patches(repeat_heads(v, heads), call.inputs.grid)
        y = ops.conv(values, params["kernel"], groups=values.shape[-1])
        return y.astype(jnp.float32) + ops.value(params["bias"], jnp.float32)
