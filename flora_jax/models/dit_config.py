"""The configuration of a diffusion transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

from flora_jax.attention import ConvShare, Softmax, Variant
from flora_jax.core.errors import ConfigError
from flora_jax.models import encoder_layers as encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Hyper-parameters of :class:`DiT`; the defaults are DiT-XL/2's (arXiv 2212.09748).

    Args:
      patch_size: side of a square patch; 1 makes a token of every pixel.
      num_channels: of the images (or latents).
      intermediate_size: MLP width.
      attention: the attention variant (docs/attention.md).
      projection: what the linear layers of the blocks are; None for dense layers.
      num_classes: 0 for images without labels; else one more label, ``num_classes``, means none.
      learned_variance: the output has twice the channels, the second half for the variance.
      frequencies: width of the sinusoidal embedding of the time.
      dtype, param_dtype: of the activations and of the parameters.
      scan_layers: one scanned component ``layers`` or components ``layers_0``, ``layers_1`` ...
      remat: what the backward pass recomputes: ``none``, ``full`` (all of a block), ``dots``
        (all but products), ``dots_no_batch`` (all but products with a weight).

    >>> DiTConfig.tiny(patch_size=1).hidden_size
    64
    """

    patch_size: int = 2
    num_channels: int = 4
    hidden_size: int = 1152
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    intermediate_size: int = 4608
    hidden_act: str = "gelu_new"
    qkv_bias: bool = True
    attention: Variant = Softmax()
    projection: ConvShare | None = None
    layer_norm_eps: float = 1e-6
    num_classes: int = 1000
    learned_variance: bool = True
    frequencies: int = 256
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        encoder.check_heads(self.hidden_size, self.num_attention_heads)
        encoder.check_choice("hidden_act", self.hidden_act, encoder.ACTIVATIONS)
        encoder.check_choice("remat", self.remat, encoder.REMAT)
        for name, part in (("hidden_size", 4), ("frequencies", 2)):
            if getattr(self, name) % part:
                size = getattr(self, name)
                raise ConfigError(f"{name}={size}: sines and cosines need a multiple of {part}")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.num_channels * (2 if self.learned_variance else 1)

    @classmethod
    def tiny(cls, **changes: Any) -> DiTConfig:
        """For 8x8 digits: patch 2, width 64, four blocks, four heads, MLP 256, ten classes."""
        sizes = {
            "num_channels": 1,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "num_classes": 10,
            "frequencies": 64,
        }
        return cls(**(sizes | changes))
