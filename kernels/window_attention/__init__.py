"""Exact softmax attention over a window of the last keys."""

from flora_jax.kernels.window_attention.api import window_attention as window_attention

__all__ = ["window_attention"]
