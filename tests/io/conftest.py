"""A random Llama of transformers and ours of the same weights, for the tests against PEFT."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from flora_jax import io


@dataclasses.dataclass(frozen=True)
class TinyLlama:
    """The transformers model (copy it before PEFT wraps it), its folder, ours with its weights."""

    hf: Any
    folder: Path
    model: Any
    params: Any


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """``make(**changes of the configuration)``; the same changes give the same model."""

    @functools.cache
    def make(**changes: Any) -> TinyLlama:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 40,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes)).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(0.2 * torch.randn_like(p))
        folder = tmp_path_factory.mktemp("llama")
        hf.save_pretrained(folder)
        return TinyLlama(hf, folder, *io.load_hf(folder))

    return make
