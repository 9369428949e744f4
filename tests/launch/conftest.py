"""A tiny decoder with a byte tokenizer on disk, and gin cleaned between tests."""

import jax
import pytest

from flora_jax import config, io
from flora_jax.launch import catalogue
from flora_jax.models import Llama, LlamaConfig, registry

GIN = """
adapter = @LoRA()
LoRA.rank = 2
train.model = @LanguageModel()
LanguageModel.source = '{model}'
train.data = @TextData()
TextData.source = '{text}'
TextData.seq_len = 16
train.rules = {{'layers/self_attn/(q|v)_proj/kernel': %adapter}}
train.optimizer = @AdamW()
AdamW.learning_rate = 1e-2
train.steps = 4
train.batch_size = 4
train.log_every = 2
train.prompt = 'the fox'
train.sample_tokens = 4
"""


@pytest.fixture(autouse=True)
def _clean_gin():
    catalogue.register_all()
    config.clear()
    yield
    config.clear()


def byte_tokenizer():
    """256 bytes, one merge and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from flora_jax.io.tokenizer import Tokenizer as Ours

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<|end|>", "th"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Ours(backend, bos_id=None, eos_id=256)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a Hugging Face Llama of random weights, a text and a gin file."""
    folder = tmp_path_factory.mktemp("tiny")
    model = Llama(LlamaConfig.tiny(vocab_size=258, eos_token_id=256))
    io.save_hf(folder / "model", model, registry.init(model, jax.random.key(0)))
    byte_tokenizer().save(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    text = GIN.format(model=folder / "model", text=folder / "text.txt")
    (folder / "lm.gin").write_text(text)
    return folder


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The run folder of a finished run of the tiny decoder."""
    from flora_jax.cli import main

    out = tmp_path_factory.mktemp("runs") / "lm"
    assert main(["train", f"--gin_file={tiny / 'lm.gin'}", "--out", str(out)]) == 0
    return out
