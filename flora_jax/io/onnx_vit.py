"""A DINOv2 backbone out of an ONNX graph that torch exported.

Biases, norms and the patch convolution keep their Hugging Face names; the exporter renames the
matrices (``onnx::MatMul_*``, stored ``[in, out]``) and splits the position table. A matrix gets its
name back from the bias that is added to its product.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.io.encoders import DINOV2
from flora_jax.io.names import to_ours
from flora_jax.models import registry
from flora_jax.models.vit import ViT
from flora_jax.models.vit_config import ViTConfig


def load_onnx_vit(
    path: str | Path, *, prefix: str = "backbone.", head_dim: int = 64, **options: Any
) -> tuple[ViT, dict[str, Any]]:
    """A :class:`ViT` and its parameters; whatever of the graph is not the backbone is left out.

    Args:
      prefix: what the backbone's names start with in the graph.
      head_dim: width of an attention head, which no tensor shows; 64 in every DINOv2.
      options: other fields of :class:`ViTConfig`, e.g. ``remat="full"``.

    Raises:
      FormatError: not an ONNX file, or no DINOv2 backbone under that prefix.
      ConfigError: the ``onnx`` package is not installed.
    """
    tensors = read_tensors(path, prefix)
    model = ViT(_config(tensors, head_dim, str(path), options))
    params = to_ours(DINOV2, registry.abstract(model), tensors, where=str(path))
    return model, params


def read_tensors(path: str | Path, prefix: str) -> dict[str, np.ndarray]:
    """The backbone's tensors under their Hugging Face names, in torch's layouts."""
    graph, to_array = _graph(path)
    named, anonymous = {}, {}
    for tensor in graph.initializer:
        if tensor.name.startswith(prefix):
            named[tensor.name.removeprefix(prefix)] = to_array(tensor)
        elif tensor.name.startswith("onnx::"):
            anonymous[tensor.name] = tensor
    products = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in anonymous:
            products[node.output[0]] = anonymous[node.input[1]]
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        product = [products[name] for name in node.input if name in products]
        if bias and product:
            name = bias[0].removeprefix(prefix).removesuffix("bias") + "weight"
            named[name] = to_array(product[0]).T
    tables = [t for t in anonymous.values() if len(t.dims) == 3 and t.dims[0] == 1]
    tables = sorted(map(to_array, tables), key=lambda table: table.shape[1])
    if len(tables) == 2 and tables[0].shape[1] == 1:
        named["embeddings.position_embeddings"] = np.concatenate(tables, axis=1)
    return named


def _graph(path: str | Path):
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ConfigError("reading an ONNX file needs the package onnx: pip install onnx") from None
    try:
        return onnx.load(str(path)).graph, onnx.numpy_helper.to_array
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise FormatError(f"{path}: not a whole ONNX file: {error}") from None


def _config(
    tensors: dict[str, np.ndarray], head_dim: int, where: str, options: dict[str, Any]
) -> ViTConfig:
    need = {
        "patches": "embeddings.patch_embeddings.projection.weight",
        "positions": "embeddings.position_embeddings",
        "mlp": "encoder.layer.0.mlp.fc1.weight",
    }
    shapes = {}
    for what, name in need.items():
        if name not in tensors:
            raise FormatError(f"{where}: no DINOv2 backbone under this prefix: {name} is missing")
        shapes[what] = tensors[name].shape
    width, channels, patch, _ = shapes["patches"]
    side = math.isqrt(shapes["positions"][1] - 1)
    layers = {m[1] for name in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}
    found = {
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // head_dim,
        "intermediate_size": shapes["mlp"][0],
        "use_mask_token": "embeddings.mask_token" in tensors,
    }
    return ViTConfig.dinov2_small(**(found | options))
