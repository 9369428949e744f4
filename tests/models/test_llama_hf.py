"""Our Llama family against ``transformers``, both ways, on random tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax.io as io
from flora_jax.core.paths import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1000.0, **more}


CASES = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            )
        },
    ),
    "linear": ("Llama", {"rope_parameters": rope("linear", factor=4.0)}),
    "dynamic": (
        "Llama",
        {"max_position_embeddings": 12, "rope_parameters": rope("dynamic", factor=2.0)},
    ),
    "yarn": (
        "Llama",
        {
            "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16),
            "head_dim": 16,
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-mixed-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 8}),
}


def reference(name, seed=0):
    """A random ``transformers`` model; norms and biases are not left at their trivial values."""
    family, changes = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **(SHAPE | {"pad_token_id": None, "initializer_range": 0.2} | changes)
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 23))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_round_trip(name, tokens, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs, tokens)
    model, params = io.load_hf(tmp_path / "theirs")
    got, cache = jax.jit(model.apply)({"params": params}, tokens)
    assert cache is None
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(scale, 1.0), rtol=0)

    io.save_hf(tmp_path / "ours", model, params)
    family = CASES[name][0]
    again, report = getattr(transformers, f"{family}ForCausalLM").from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(their_logits(again.eval(), tokens), expected, atol=1e-6 * scale)
    for key in ("tie_word_embeddings", "rms_norm_eps", "head_dim", "num_key_value_heads"):
        if hasattr(theirs.config, key):
            assert getattr(again.config, key) == getattr(theirs.config, key), key


def test_unrolled_parameters_are_the_same(tokens, tmp_path):
    reference("llama").save_pretrained(tmp_path)
    scanned, stacked = io.load_hf(tmp_path)
    unrolled, separate = io.load_hf(tmp_path, scan_layers=False)
    paths = flatten(separate)
    assert "layers_2/self_attn/q_proj/kernel" in paths
    kernel = stacked["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(paths["layers_2/self_attn/q_proj/kernel"], kernel[2])
    a = jax.jit(scanned.apply)({"params": stacked}, tokens)[0]
    b = jax.jit(unrolled.apply)({"params": separate}, tokens)[0]
    np.testing.assert_allclose(a, b, atol=1e-5)
    io.save_hf(tmp_path / "out", unrolled, separate)
    _, back = io.load_hf(tmp_path / "out")
    np.testing.assert_array_equal(
        back["layers"]["mlp"]["up_proj"]["kernel"], stacked["layers"]["mlp"]["up_proj"]["kernel"]
    )


def test_bfloat16_checkpoint(tokens, tmp_path):
    reference("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    # Loaded anew: .to(bfloat16) also rounds the rotary frequencies of the model in memory.
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, params = io.load_hf(tmp_path)
    assert params["norm"]["scale"].dtype == jnp.bfloat16
    model, params = io.load_hf(tmp_path, dtype="float32")
    expected = their_logits(theirs.eval(), tokens)
    got = jax.jit(model.apply)({"params": params}, tokens)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_the_body_alone_loads_with_a_tied_head(tmp_path):
    theirs = reference("llama-tied-mha")
    theirs.model.save_pretrained(tmp_path)
    model, params = io.load_hf(tmp_path)
    assert model.config.tie_word_embeddings
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], theirs.model.embed_tokens.weight.detach().numpy()
    )
