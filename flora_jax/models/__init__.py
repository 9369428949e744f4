"""Models: Linen modules with scanned layers, and the registry that builds them from a config."""

from flora_jax.models.bert import Bert, BertConfig
from flora_jax.models.conv import ConvNet, ConvNetConfig
from flora_jax.models.diffusion import DDPM, FlowMatching
from flora_jax.models.dit import DiT
from flora_jax.models.dit_config import DiTConfig
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.models.mlp import MLP, MLPConfig
from flora_jax.models.registry import abstract, architectures, build, init, register
from flora_jax.models.rope import Rope
from flora_jax.models.series import SeriesModel
from flora_jax.models.vit import ViT
from flora_jax.models.vit_config import ViTConfig

__all__ = [
    "DDPM",
    "MLP",
    "Bert",
    "BertConfig",
    "ConvNet",
    "ConvNetConfig",
    "DiT",
    "DiTConfig",
    "FlowMatching",
    "Llama",
    "LlamaConfig",
    "MLPConfig",
    "Rope",
    "SeriesModel",
    "ViT",
    "ViTConfig",
    "abstract",
    "architectures",
    "build",
    "init",
    "register",
]
