"""Evaluation: text and images from trained and pretrained models."""

from flora_jax.evaluation.generate import Sampling, generate, generate_text, stream, stream_text
from flora_jax.evaluation.sample_images import sample_images

__all__ = ["Sampling", "generate", "generate_text", "sample_images", "stream", "stream_text"]
