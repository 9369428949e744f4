"""Gated linear attention: ``S_t = diag(exp(l_t)) S_(t-1) + k_t^T v_t``, ``o_t = scale q_t S_t``."""

from flora_jax.kernels.gated_linear_attention.api import Features, gated_linear_attention

__all__ = ["Features", "gated_linear_attention"]
