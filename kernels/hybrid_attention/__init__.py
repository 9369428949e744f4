"""A window of exact softmax beside gated linear attention over all keys, weighed and added."""

from flora_jax.kernels.hybrid_attention.api import hybrid_attention as hybrid_attention

__all__ = ["hybrid_attention"]
