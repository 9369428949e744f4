"""Evaluation: generation from trained and pretrained models."""

from flora_jax.evaluation.generate import Sampling, generate, generate_text, stream, stream_text

__all__ = ["Sampling", "generate", "generate_text", "stream", "stream_text"]
