"""Models: Linen modules with scanned layers, and the registry that builds them from a config."""

from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.models.registry import abstract, architectures, build, init, register
from flora_jax.models.rope import Rope

__all__ = ["Llama", "LlamaConfig", "Rope", "abstract", "architectures", "build", "init", "register"]
