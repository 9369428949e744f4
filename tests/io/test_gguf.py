"""GGUF: round trips, the rotation's row order, block formats, and malformed files."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from flora_jax import io, models  # noqa: E402
from flora_jax.core.errors import ConfigError, FormatError, StructureError  # noqa: E402
from flora_jax.core.paths import flatten, map_with_path  # noqa: E402
from flora_jax.io.gguf import half_split, interleave  # noqa: E402
from flora_jax.io.gguf_header import read_header  # noqa: E402
from flora_jax.models import Llama, LlamaConfig, Rope  # noqa: E402

LLAMA3 = Rope(kind="llama3", theta=5e5, factor=8.0, original_length=8192)
CASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True, "head_dim": 32, "rms_norm_eps": 1e-5},
    "llama-bias": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama3": {"rope": LLAMA3},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32},
}


def random_params(model, seed=0):
    """Parameters from numpy: compiling the real initialisers takes seconds."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = 0.2 * rng.standard_normal(shape.shape) + path.endswith("scale")
        return jnp.asarray(value, shape.dtype)

    return map_with_path(leaf, models.abstract(model))


def make(**changes):
    model = Llama(LlamaConfig.tiny(**changes))
    return model, random_params(model)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
    model, params = make(**CASES[name])
    io.save_gguf(tmp_path / "m.gguf", model, params)
    back, restored, tokenizer = io.load_gguf(tmp_path / "m.gguf")
    assert tokenizer is None
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    for key in model.config.__dataclass_fields__.keys() - ids.keys():
        assert getattr(back.config, key) == getattr(model.config, key), key
    assert flatten(params).keys() == flatten(restored).keys()
    jax.tree.map(np.testing.assert_array_equal, params, restored)


def test_rows_are_permuted_for_llama_only(tmp_path):
    for name, permuted in (("llama", True), ("qwen2", False)):
        model, params = make(**CASES[name])
        io.save_gguf(tmp_path / f"{name}.gguf", model, params)
        stored = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        raw = next(t.data for t in stored.tensors if t.name == "blk.1.attn_k.weight")
        ours = np.asarray(params["layers"]["self_attn"]["k_proj"]["kernel"][1]).T
        assert np.array_equal(raw, ours) is not permuted
        if permuted:
            np.testing.assert_array_equal(half_split(raw, 2), ours)
            # Row 2m of a head in the file is row m of its first half.
            np.testing.assert_array_equal(raw[2], ours[1])
            np.testing.assert_array_equal(raw[3], ours[8 + 1])


def test_permutations_are_inverse():
    rows = np.random.default_rng(0).normal(size=(24, 5))
    np.testing.assert_array_equal(half_split(interleave(rows, 3), 3), rows)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float16", 1e-3), ("bfloat16", 8e-3), ("q8_0", 1e-2), ("q4_1", 0.08), ("q4_0", 0.15)],
)
def test_smaller_dtypes(dtype, error, tmp_path):
    model, params = make()
    io.save_gguf(tmp_path / "m.gguf", model, params, dtype=dtype)
    _, back, _ = io.load_gguf(tmp_path / "m.gguf", dtype="bfloat16")
    assert back["norm"]["scale"].dtype == jnp.bfloat16
    _, back, _ = io.load_gguf(tmp_path / "m.gguf")
    np.testing.assert_array_equal(back["norm"]["scale"], params["norm"]["scale"])
    a, b = params["layers"]["mlp"]["up_proj"]["kernel"], back["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.linalg.norm(a - b) <= error * np.linalg.norm(a)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["llama", "tied", "qwen2"])
def test_transformers_reads_our_files(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = make(**CASES[name])
    io.save_gguf(tmp_path / "m.gguf", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    got, _ = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_what_cannot_be_written(tmp_path):
    model, params = make(sliding_window=3, sliding_layers=(True, False), family="qwen2")
    with pytest.raises(ConfigError, match="windows"):
        io.save_gguf(tmp_path / "m.gguf", model, params)
    model, params = make()
    with pytest.raises(ConfigError, match="nearest: float16|nearest: float32"):
        io.save_gguf(tmp_path / "m.gguf", model, params, dtype="float61")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model, params = make()
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    io.save_gguf(path, model, params)
    return path.read_bytes()


def damaged(tmp_path, data):
    (tmp_path / "x.gguf").write_bytes(data)
    return tmp_path / "x.gguf"


def replaced(data, at, code, value):
    return data[:at] + struct.pack("<" + code, value) + data[at + struct.calcsize("<" + code) :]


def test_malformed_headers(whole, tmp_path):
    cases = {
        "no such file": None,
        "24": b"GGUF",
        "begins with": b"GGML" + whole[4:],
        "version 99": replaced(whole, 4, "I", 99),
        "tensor": replaced(whole, 8, "Q", 2**60),
        "truncated or forged": replaced(whole, 16, "Q", 2**60),
        "a metadata key": replaced(whole, 24, "Q", 2**50),
        "truncated": whole[: len(whole) - 5],
    }
    for message, data in cases.items():
        path = tmp_path / "absent.gguf" if data is None else damaged(tmp_path, data)
        with pytest.raises(FormatError, match=message):
            io.load_gguf(path)


def test_forged_array_count_is_found_before_the_loop(tmp_path):
    for kind, item in ((8, b""), (0, b"")):
        field = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**61) + item
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field
        with pytest.raises(FormatError, match="truncated or forged"):
            read_header(damaged(tmp_path, data))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_truncation_anywhere_is_an_error(whole, tmp_path_factory, data):
    cut = data.draw(st.integers(0, len(whole) - 33))
    path = damaged(tmp_path_factory.mktemp("cut"), whole[:cut])
    with pytest.raises(FormatError):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_escape_as_other_errors(whole, tmp_path_factory, data):
    start = whole.index(b"output_norm.weight")
    at = data.draw(st.integers(0, min(start + 200, len(whole) - 1)))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    path = damaged(tmp_path_factory.mktemp("flip"), bytes(changed))
    try:
        io.load_gguf(path)
    except Exception as error:
        assert isinstance(error, FormatError | ConfigError | StructureError), repr(error)


def test_forged_number_of_layers(whole, tmp_path):
    key = b"llama.block_count"
    at = whole.index(key) + len(key) + 4
    with pytest.raises(FormatError, match="block_count 2000000000, but tensors of 2 blocks"):
        io.load_gguf(damaged(tmp_path, replaced(whole, at, "I", 2_000_000_000)))


def test_forged_head_size(whole, tmp_path):
    key = b"llama.attention.key_length"
    at = whole.index(key) + len(key) + 4
    with pytest.raises(FormatError, match="4 heads of 2000000000 do not fit"):
        io.load_gguf(damaged(tmp_path, replaced(whole, at, "I", 2_000_000_000)))
    with pytest.raises(FormatError, match="not a positive integer"):
        io.load_gguf(damaged(tmp_path, replaced(whole, at, "I", 0)))


def test_missing_tensors_and_metadata(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="no metadata 'llama.attention.head_count'"):
        io.load_gguf(tmp_path / "x.gguf")


@pytest.mark.real
def test_smollm2():
    try:
        path = io.find("smollm2-135m")
    except ConfigError as error:
        pytest.skip(str(error))
    model, params, tokenizer = io.load(path)
    assert model.config == LlamaConfig.smollm2_135m(pad_token_id=2)
    assert tokenizer.vocab_size == 49152
    text = "The quick brown fox jumps over the lazy dog. It was a bright cold day in April."
    ids = jnp.asarray([tokenizer.encode(text)])
    logits, _ = jax.jit(model.apply)({"params": params}, ids)
    scores = jax.nn.log_softmax(logits[0, :-1])[jnp.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert 2.0 < -scores.mean() < 4.0
