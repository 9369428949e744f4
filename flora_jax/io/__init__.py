"""Files: safetensors, Hugging Face checkpoints, GGUF, tokenizers; never a pickle."""

from flora_jax.io import encoders
from flora_jax.io.hf import load_hf, save_hf

__all__ = ["encoders", "load_hf", "save_hf"]
