"""Hugging Face checkpoints: ``config.json`` with safetensors weights, both ways, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn

from flora_jax.core.errors import StructureError
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.core.paths import flatten
from flora_jax.io import safetensors
from flora_jax.io.files import read_json, write_json
from flora_jax.io.names import OUT_IN, NameMap, Rule, Theirs, name_map, register, to_ours
from flora_jax.models import registry

LLAMA = register(
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    table=NameMap(
        rules=(
            Rule("embed_tokens/embedding", "model.embed_tokens.weight"),
            Rule(r"layers/(self_attn/attention/.+)", r"model.layers.{layer}.\1"),
            Rule(r"layers/(.+)/kernel", r"model.layers.{layer}.\1.weight", OUT_IN),
            Rule(r"layers/(.+)/bias", r"model.layers.{layer}.\1.bias"),
            Rule(r"layers/(.+)/scale", r"model.layers.{layer}.\1.weight"),
            Rule("norm/scale", "model.norm.weight"),
            Rule("lm_head/kernel", "lm_head.weight", OUT_IN),
        ),
        prefix="model.",
        ignore=(r".*rotary_emb\.inv_freq",),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
    ),
)


def load_hf(
    folder: str | Path, *, dtype: Any = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its parameters from a Hugging Face checkpoint folder.

    Args:
      folder: holds ``config.json`` and ``model.safetensors`` or its shards and index.
      dtype: the parameters' dtype; ``None`` keeps the file's.
      options: fields of the module, e.g. ``scan_layers=False``, ``remat="full"``.

    Raises:
      FormatError: a file is missing, truncated or forged.
      StructureError: missing, extra or misshaped tensors.
      ConfigError: an architecture that is not ours.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    model = registry.build(config, **options)
    tensors = safetensors.TensorFiles(folder)
    params = to_ours(
        name_map(config), registry.abstract(model), tensors, dtype=dtype, where=str(folder)
    )
    return model, params


def save_hf(
    folder: str | Path,
    model: nn.Module,
    params: Any,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
) -> None:
    """A checkpoint folder that ``transformers`` loads: weights, then ``config.json``.

    Raises:
      StructureError: a leaf is no plain array (materialize adapters, dequantize first).
      FormatError: the folder holds weights and ``overwrite`` is false.
    """
    folder = Path(folder)
    for path, leaf in flatten(params, is_leaf=is_leaf).items():
        if isinstance(leaf, WeightLeaf):
            raise StructureError(
                f"{path} is a {type(leaf).__name__}; flora_jax.materialize() the parameters first"
            )
    config = model.to_hf()
    config["dtype"] = config["torch_dtype"] = str(next(iter(flatten(params).values())).dtype)
    tensors = Theirs(name_map(config), params)
    safetensors.save(
        folder,
        tensors,
        sizes=tensors.sizes(),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    write_json(folder / "config.json", config)
