"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their long-context variants.

``inv_freq[m] = theta^(-2m/H)``, angle ``position * inv_freq``; dimension m turns with dimension
``m + H/2`` (the half-split of GPT-NeoX and Hugging Face, not the interleaved pairs of Llama's own
code, which GGUF keeps).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError, unknown

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
_EXTRA = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": _YARN}
"""Keys of a ``rope_scaling`` object beside the factor and the original length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of a rotary embedding.

    Args:
      kind: ``default``; ``linear`` (positions divided by factor); ``dynamic`` (NTK: theta grows
        with the longest position of the call once that passes the original length); ``llama3``
        (low frequencies divided by factor, smoothly); ``yarn`` (Peng et al., arXiv 2309.00071).
      original_length: positions the model was pretrained on.
      attention_factor: what cos and sin are multiplied by (``yarn``); ``None`` for its formula.

    >>> Rope(theta=100.0).inv_freq(4).tolist()
    [1.0, 0.10000000149011612]
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(unknown("rope type", self.kind, KINDS))
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_length <= 0:
            raise ConfigError(f"rope type {self.kind!r} needs original_length, got 0")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_positions: int) -> Rope:
        """From a ``config.json``, in the old form (``rope_theta``, ``rope_scaling``) or the new
        (``rope_parameters``).

        Raises:
          ConfigError: an unknown type, or rotary dimensions that cover the head only in part.
        """
        data = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        kind = data.pop("rope_type", data.pop("type", None)) or "default"
        data.pop("type", None)
        if (data.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor other than 1 is not supported")
        theta = data.get("rope_theta") or config.get("rope_theta") or 10000.0
        length = data.get("original_max_position_embeddings") or max_positions
        names = {f.name for f in dataclasses.fields(cls)} - {"kind", "theta", "original_length"}
        rest = {k: v for k, v in data.items() if k in names and v is not None}
        if kind == "default":
            return cls(theta=float(theta))
        return cls(kind=kind, theta=float(theta), original_length=int(length), **rest)

    def to_hf(self) -> dict[str, Any]:
        """The ``rope_theta`` and ``rope_scaling`` keys of a ``config.json``."""
        if self.kind == "default":
            return {"rope_theta": self.theta, "rope_scaling": None}
        scaling = {"rope_type": self.kind, "factor": self.factor}
        for key in _EXTRA.get(self.kind, ()):
            if getattr(self, key) is not None:
                scaling[key] = getattr(self, key)
        if self.kind != "linear":
            scaling["original_max_position_embeddings"] = self.original_length
        return {"rope_theta": self.theta, "rope_scaling": scaling}

    def inv_freq(self, dim: int) -> np.ndarray:
        """``[dim/2]`` frequencies in float32 (for ``dynamic``: those below the original length)."""
        inv = 1.0 / self.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.kind == "linear":
            inv = inv / self.factor
        elif self.kind == "llama3":
            inv = self._llama3(inv)
        elif self.kind == "yarn":
            inv = self._yarn(inv, dim)
        return inv.astype(np.float32)

    def _llama3(self, inv: np.ndarray) -> np.ndarray:
        """Wavelengths over L/low are stretched by factor, under L/high kept, blended between."""
        turns = self.original_length * inv / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * inv / self.factor + smooth * inv

    def _yarn(self, inv: np.ndarray, dim: int) -> np.ndarray:
        """Dimensions that turn under beta_slow times in L are stretched, over beta_fast kept."""

        def dimension(turns: float) -> float:
            length = self.original_length / (turns * 2 * math.pi)
            return dim * math.log(length) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2) - low) / (high - low if high != low else 0.001)
        keep = 1 - np.clip(ramp, 0.0, 1.0)
        return inv / self.factor * (1 - keep) + inv * keep

    def scale(self) -> float:
        """What cos and sin are multiplied by: 1 but for ``yarn``."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def mscale(m: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * m * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)

    def angles(self, positions: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        """``(cos, sin)``, each ``[B, T, dim/2]`` float32, for positions ``[B, T]``."""
        inv = jnp.asarray(self.inv_freq(dim))
        if self.kind == "dynamic":
            length = jnp.maximum(positions.max() + 1, self.original_length).astype(jnp.float32)
            grown = self.factor * length / self.original_length - (self.factor - 1)
            exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
            inv = inv * grown ** (-(dim / (dim - 2)) * exponent)
        angle = positions[..., None].astype(jnp.float32) * inv
        return jnp.cos(angle) * self.scale(), jnp.sin(angle) * self.scale()


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn ``x [B, T, N, H]`` by angles ``[B, T, H/2]``, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
