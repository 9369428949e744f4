"""The configuration of a vision transformer and its Hugging Face ``config.json``, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flora_jax.attention import ConvShare, Softmax, Variant
from flora_jax.core.errors import ConfigError
from flora_jax.models import encoder_layers as encoder
from flora_jax.models.attention_config import read_attention, write_attention

POOLING = ("cls", "mean", "cls_mean", "pooler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Hyper-parameters of :class:`ViT`; the field names are Hugging Face's where it has them.

    Args:
      image_size: side of the (square) images that the position table was made for; other sizes
        resize the table.
      intermediate_size: MLP width (of both halves together for SwiGLU).
      layerscale_value: initial LayerScale; ``None`` for a ViT without LayerScale.
      drop_path_rate: stochastic depth, the same in every layer.
      initializer_range: deviation of the normal init of the kernels; ``None`` is LeCun normal.
      num_labels: width of the classification head ``classifier``; 0 for none.
      pooling: what the head reads: ``cls``, ``mean`` (of the patches), ``cls_mean`` (both, joined)
        or ``pooler`` (tanh layer on cls; needs ``use_pooler``).
      attention: the variant that every layer has.
      projection: what the linear layers of the blocks are; None for dense layers.
      dtype, param_dtype: of the activations and of the parameters.
      scan_layers: one scanned component ``layers`` or components ``layers_0``, ``layers_1`` ...
      remat: what the backward pass recomputes: ``none``, ``full`` (all of a block), ``dots``
        (all but products), ``dots_no_batch`` (all but products with a weight).

    >>> ViTConfig.tiny().grid
    4
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    qkv_bias: bool = True
    layerscale_value: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float | None = 0.02
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    use_mask_token: bool = False
    use_pooler: bool = False
    num_labels: int = 0
    pooling: str = "cls"
    attention: Variant = Softmax()
    projection: ConvShare | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        encoder.check_heads(self.hidden_size, self.num_attention_heads)
        encoder.check_choice("hidden_act", self.hidden_act, encoder.ACTIVATIONS)
        encoder.check_choice("pooling", self.pooling, POOLING)
        encoder.check_choice("remat", self.remat, encoder.REMAT)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}"
            )
        if self.num_labels and self.pooling == "pooler" and not self.use_pooler:
            raise ConfigError("pooling='pooler' needs use_pooler=True")

    @property
    def grid(self) -> int:
        """Patches along one side of an image of ``image_size``."""
        return self.image_size // self.patch_size

    @classmethod
    def tiny(cls, **changes: Any) -> ViTConfig:
        """For 8x8 digits: patch 2, width 64, two blocks, four heads, MLP 128, ten classes.

        For MNIST: ``ViTConfig.tiny(image_size=28, patch_size=4)``.
        """
        sizes = {
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "layer_norm_eps": 1e-6,
            "initializer_range": None,
            "num_labels": 10,
        }
        return cls(**(sizes | changes))

    @classmethod
    def dinov2_small(cls, **changes: Any) -> ViTConfig:
        """DINOv2 ViT-S/14: width 384, 12 layers, a 37x37 position table."""
        sizes = {
            "image_size": 518,
            "patch_size": 14,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "layerscale_value": 1.0,
            "layer_norm_eps": 1e-6,
            "use_mask_token": True,
            "pooling": "cls_mean",
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **changes: Any) -> ViTConfig:
        """From a Hugging Face ``config.json`` of a ``vit`` or ``dinov2``; ``changes`` override.

        Dropout and stochastic depth are off unless asked for by ``changes``.

        Raises:
          ConfigError: another architecture, or images or patches that are not square.
        """
        kind = config.get("model_type")
        encoder.check_choice("model_type", str(kind), _HF_DEFAULTS)
        values = dict(_HF_DEFAULTS[kind])
        names = {field.name for field in dataclasses.fields(cls)}
        names -= {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"}
        names -= set(encoder.POLICY)
        values |= {name: config[name] for name in names if name in config}
        for name in ("image_size", "patch_size"):
            values[name] = _side(name, values.get(name, getattr(cls, name)))
        if kind == "dinov2":
            wide = int(values.get("hidden_size", cls.hidden_size) * config.get("mlp_ratio", 4))
            # Hugging Face gives SwiGLU two thirds of the MLP, in eights, for each half.
            narrow = 2 * ((wide * 2 // 3 + 7) // 8 * 8)
            values["intermediate_size"] = narrow if values.get("use_swiglu_ffn") else wide
        values["num_labels"] = encoder.read_labels(config)
        values |= read_attention(config)
        if kind == "vit":
            values["use_pooler"] = config.get("use_pooler", not values["num_labels"])
        return cls(**(values | changes))

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json``: ``dinov2`` with LayerScale, ``vit`` without.

        Raises:
          ConfigError: Hugging Face has no such model.
        """
        kind = "vit" if self.layerscale_value is None else "dinov2"
        self._check_hf(kind)
        ours = {"num_labels", "pooling", "use_pooler", "attention", "projection", *encoder.POLICY}
        data = {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}
        data |= write_attention(self.attention)
        if kind == "vit":
            for name in ("layerscale_value", "use_swiglu_ffn", "use_mask_token", "drop_path_rate"):
                del data[name]
        else:
            ratio = data.pop("intermediate_size") / self.hidden_size
            data["mlp_ratio"] = 4 if self.use_swiglu_ffn else int(ratio)
        data["initializer_range"] = self.initializer_range or 0.02
        prefix = {"vit": "ViT", "dinov2": "Dinov2"}[kind]
        suffix = "ForImageClassification" if self.num_labels else "Model"
        data |= {"model_type": kind, "architectures": [prefix + suffix]}
        if self.num_labels:
            data |= encoder.write_labels(self.num_labels)
        if self.pooling != _HF_DEFAULTS[kind]["pooling"]:
            data["pooling"] = self.pooling
        if kind == "vit" and self.use_pooler == bool(self.num_labels):
            data["use_pooler"] = self.use_pooler
        return data

    def _check_hf(self, kind: str) -> None:
        wrong = None
        if kind == "vit" and (self.use_swiglu_ffn or self.use_mask_token or self.drop_path_rate):
            wrong = "a SwiGLU, a mask token or stochastic depth without LayerScale"
        if kind == "dinov2":
            wide = self.hidden_size * 4
            swiglu = 2 * ((wide * 2 // 3 + 7) // 8 * 8)
            fits = (
                self.intermediate_size == swiglu
                if self.use_swiglu_ffn
                else self.intermediate_size % self.hidden_size == 0
            )
            if not fits:
                wrong = f"intermediate_size={self.intermediate_size} with LayerScale"
            if self.use_pooler:
                wrong = "a pooler with LayerScale"
        if self.projection is not None:
            wrong = f"projections {self.projection}"
        if wrong:
            raise ConfigError(f"the Hugging Face file formats have no ViT with {wrong}")


_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {"layer_norm_eps": 1e-12, "pooling": "cls"},
    "dinov2": {
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "use_mask_token": True,
        "pooling": "cls_mean",
    },
}


def _side(name: str, value: Any) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{name}={value} is not square")
    return int(sides.pop())
