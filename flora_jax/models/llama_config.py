"""Hyper-parameters of the Llama family and their Hugging Face form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flora_jax.attention import Softmax, Variant
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.models.attention_config import read_attention, write_attention
from flora_jax.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
REMAT = ("none", "full", "dots", "dots_no_batch")
FAMILY = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One decoder of the family: Llama 1-3, SmolLM2, Mistral, Qwen2, Qwen3.

    Args:
      family: ``model_type`` of Hugging Face, one of ``llama, mistral, qwen2, qwen3``; it says
        what :meth:`to_hf` writes, the other fields say what is computed.
      qkv_bias, o_bias, mlp_bias: whether these projections have a bias (Qwen2: q, k, v).
      qk_norm: RMSNorm of each query and key head before the rotation (Qwen3).
      sliding_window: a query sees this many last keys, itself included; ``None`` for all.
      sliding_layers: which layers have the window; ``None`` for all of them.
      attention: the variant that every layer has.
      dtype, param_dtype: of the activations and of the parameters.
      scan_layers: one scanned component ``layers`` or components ``layers_0``, ``layers_1`` ...
      remat: what the backward pass recomputes: ``none``, ``full`` (all of a block), ``dots``
        (all but products), ``dots_no_batch`` (all but products with a weight).

    >>> LlamaConfig.tiny(num_key_value_heads=2).head_dim
    16
    """

    family: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    attention: Variant = Softmax()
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.num_attention_heads < 1:
            raise ConfigError(f"num_attention_heads={self.num_attention_heads} must be at least 1")
        set_("num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        set_("head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)
        for name, table in (("family", FAMILY), ("hidden_act", ACTIVATIONS), ("remat", REMAT)):
            if getattr(self, name) not in table:
                raise ConfigError(unknown(name, getattr(self, name), table))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for a rotary embedding")
        if self.sliding_layers and len(self.sliding_layers) != self.num_hidden_layers:
            raise ConfigError(
                f"sliding_layers has {len(self.sliding_layers)} values for "
                f"{self.num_hidden_layers} layers"
            )

    @classmethod
    def tiny(cls, **changes: Any) -> LlamaConfig:
        """Two layers, width 64, vocabulary 256: for tests and dry runs."""
        small = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
        return cls(**(small | changes))

    @classmethod
    def smollm2_135m(cls, **changes: Any) -> LlamaConfig:
        """SmolLM2-135M: 30 layers, 9 query and 3 key heads of 64, tied embedding."""
        values = {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope": Rope(theta=100000.0),
            "tie_word_embeddings": True,
        }
        return cls(**(values | changes))

    @property
    def mixed_windows(self) -> bool:
        """Whether some layers slide and others do not."""
        return self.sliding_window is not None and len(set(self.sliding_layers or ())) > 1

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of every layer, ``None`` where it sees everything."""
        on = self.sliding_layers or (True,) * self.num_hidden_layers
        return tuple(self.sliding_window if s else None for s in on)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **options: Any) -> LlamaConfig:
        """From a ``config.json``; options are fields that it does not speak of (``remat`` ...).

        Raises:
          ConfigError: another ``model_type``, or a value that is not supported.
        """
        family = config.get("model_type", "llama")
        if family not in FAMILY:
            raise ConfigError(unknown("model_type", str(family), FAMILY))
        same = {f.name for f in dataclasses.fields(cls)} - _OWN
        values = {k: v for k, v in config.items() if k in same and v is not None}
        values["family"] = family
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        bias = bool(config.get("attention_bias", False))
        values["qkv_bias"] = True if family == "qwen2" else bias
        values["o_bias"] = False if family == "qwen2" else bias
        values["qk_norm"] = family == "qwen3"
        layers = values.get("num_hidden_layers", cls.num_hidden_layers)
        values["sliding_window"], values["sliding_layers"] = _windows(config, family, layers)
        length = values.get("max_position_embeddings", cls.max_position_embeddings)
        values["rope"] = Rope.from_hf(config, length)
        values |= read_attention(config)
        return cls(**(values | options))

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that ``transformers`` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config: dict[str, Any] = {
            "architectures": [FAMILY[self.family]],
            "model_type": self.family,
            **{k: v for k, v in fields.items() if k not in _OWN},
            **self.rope.to_hf(),
            **write_attention(self.attention),
            "use_cache": True,
        }
        if isinstance(self.eos_token_id, tuple):
            config["eos_token_id"] = list(self.eos_token_id)
        if self.family in ("llama", "qwen3"):
            config["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            config["mlp_bias"] = self.mlp_bias
        if self.family != "llama":
            config["sliding_window"] = self.sliding_window
        if self.family.startswith("qwen"):
            config["use_sliding_window"] = self.sliding_window is not None
            config["layer_types"] = [
                "full_attention" if w is None else "sliding_attention" for w in self.windows
            ]
        return config


_RUN = {"dtype", "param_dtype", "scan_layers", "remat"}
_SPELT = {"qkv_bias", "o_bias", "qk_norm", "sliding_window", "sliding_layers"}
_OWN = _RUN | _SPELT | {"family", "rope", "attention"}
"""Fields without a namesake in ``config.json`` (``dtype`` there is that of the file)."""


def _windows(
    config: Mapping[str, Any], family: str, layers: int
) -> tuple[int | None, tuple[bool, ...] | None]:
    """``(sliding_window, sliding_layers)`` as each family spells them."""
    window = config.get("sliding_window")
    if family == "llama" or window is None:
        return None, None
    if family == "mistral":
        return window, None
    if not config.get("use_sliding_window", False):
        return None, None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        on = tuple(i >= first for i in range(layers))
    else:
        on = tuple(t == "sliding_attention" for t in types)
    return (window, None if all(on) else on) if any(on) else (None, None)
