"""Hyper-parameters of sparse-linear attention and its feature maps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.core.errors import ConfigError, unknown

VARIANTS = ("paper", "sla1", "main")
FEATURES = {
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    # elu(x) + 1 without expm1, which a TPU kernel has not.
    "elu1": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x))),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """What of the attention is exact, what is approximated and what is left out.

    Args:
      variant: ``paper`` (the linear branch sees the marginal blocks: neither critical nor
        negligible), ``sla1`` (the authors' fused kernel: no negligible blocks) or ``main`` (their
        later code: the linear branch sees all keys, the critical ones too).
      critical: share of a row's key blocks that softmax attends to, at least one block.
      negligible: share that nothing attends to, of ``paper`` only.
      block_q: queries per block.
      block_k: keys per block.
      features: map of the linear branch: ``softmax``, ``elu1`` or ``relu``.

    Raises:
      ConfigError: unknown variant or map, shares outside [0, 1], blocks below 1.
    """

    variant: str = "main"
    critical: float = 0.05
    negligible: float = 0.1
    block_q: int = 128
    block_k: int = 64
    features: str = "softmax"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ConfigError(unknown("SLA variant", self.variant, VARIANTS))
        if self.features not in FEATURES:
            raise ConfigError(unknown("SLA feature map", self.features, FEATURES))
        for name in ("critical", "negligible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"SLA {name}={getattr(self, name)}: a share in [0, 1]")
        if min(self.block_q, self.block_k) < 1:
            raise ConfigError(f"SLA blocks {self.block_q} x {self.block_k}: at least 1")

    def counts(self, key_blocks: int) -> tuple[int, int]:
        """Critical and negligible blocks of a row of ``key_blocks``.

        >>> SLAConfig(variant="paper").counts(512)
        (25, 51)
        """
        critical = min(max(int(self.critical * key_blocks), 1), key_blocks)
        negligible = int(self.negligible * key_blocks) if self.variant == "paper" else 0
        return critical, min(negligible, key_blocks - critical)

    def phi(self, x: Array) -> Array:
        """The feature map, computed in float32."""
        return FEATURES[self.features](x.astype(jnp.float32)).astype(x.dtype)
