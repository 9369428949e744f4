"""Files: safetensors, Hugging Face checkpoints, GGUF, tokenizers; never a pickle."""

import importlib
from typing import Any

from flora_jax.io import encoders
from flora_jax.io.hf import load_hf, save_hf
from flora_jax.io.peft_load import load_peft
from flora_jax.io.peft_save import save_peft
from flora_jax.io.sparse import apply_delta, load_delta, save_delta, sparse_delta

# These need the packages of the [hf] extra, so they are imported when first used.
_LAZY = {
    "Pretrained": "flora_jax.io.sources",
    "Tokenizer": "flora_jax.io.tokenizer",
    "find": "flora_jax.io.sources",
    "load": "flora_jax.io.sources",
    "load_gguf": "flora_jax.io.gguf",
    "load_onnx_vit": "flora_jax.io.onnx_vit",
    "save_gguf": "flora_jax.io.gguf",
}

__all__ = [
    "apply_delta",
    "encoders",
    "load_delta",
    "load_hf",
    "load_peft",
    "save_delta",
    "save_hf",
    "save_peft",
    "sparse_delta",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"flora_jax.io.{name} needs {error.name!r}: pip install 'flora_jax[hf]'"
        ) from error
