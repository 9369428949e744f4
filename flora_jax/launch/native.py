"""Our own checkpoint folder of a whole model: orbax arrays, low-bit leaves kept as they are.

``flora.json`` (the Hugging Face configuration and the format of every low-bit weight, written
last), ``params/`` (orbax), ``tokenizer.json``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flora_jax import quant
from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import flatten
from flora_jax.io.files import read_json, write_json
from flora_jax.models import registry
from flora_jax.training.run_dir import disk_errors

MANIFEST = "flora.json"
VERSION = 1


def is_native(path: str | Path) -> bool:
    """Whether a path is such a folder."""
    return (Path(path) / MANIFEST).is_file()


def save(folder: str | Path, model: nn.Module, params: Any, tokenizer: Any = None) -> None:
    """Writes the folder; refuses one that holds a model.

    Raises:
      ConfigError: a model without a Hugging Face configuration, or with adapters bound.
      FormatError: the folder holds a model.
    """
    folder = Path(folder).absolute()
    if is_native(folder):
        raise FormatError(f"{folder} already holds a model; choose another folder")
    if not hasattr(model, "to_hf"):
        raise ConfigError(f"{type(model).__name__} has no Hugging Face configuration to save")
    flat = flatten(params, is_leaf=is_leaf)
    for path, leaf in flat.items():
        if is_leaf(leaf) and not isinstance(leaf, quant.QArray):
            raise ConfigError(
                f"{path} is a {type(leaf).__name__}; materialize() the adapters first"
            )
    low = {p: dataclasses.asdict(x.fmt) for p, x in flat.items() if isinstance(x, quant.QArray)}
    dtypes = {str(x.dtype) for x in flat.values()}
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params, force=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    manifest = {"version": VERSION, "config": model.to_hf(), "dtype": dtypes.pop(), "formats": low}
    write_json(folder / MANIFEST, manifest)


def load(folder: str | Path, **options: Any) -> tuple[nn.Module, Any, Any]:
    """``(model, params, tokenizer or None)``; options are fields of the model's configuration.

    Raises:
      FormatError: not such a folder, or of another version.
    """
    folder = Path(folder).absolute()
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise FormatError(f"{folder}: version {manifest.get('version')} is not {VERSION}")
    model = registry.build(manifest["config"], **options)
    dtype = jnp.dtype(manifest["dtype"])

    def shaped() -> Any:
        params = registry.init(model, jax.random.key(0))
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        rules = {re.escape(p): quant.Format(**f) for p, f in manifest["formats"].items()}
        return quant.quantize(params, rules)

    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", jax.eval_shape(shaped))
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        from flora_jax.io.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_hf(folder)
    return model, params, tokenizer
