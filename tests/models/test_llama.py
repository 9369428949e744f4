"""The decoder on its own: masks, packing, cache, scan against loop, remat, dtypes, sharp edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import models
from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten, map_with_path
from flora_jax.models import Llama, LlamaConfig, Rope
from flora_jax.models.rope import rotate


def random_params(model, seed=0):
    """Parameters from numpy: compiling the real initialisers takes seconds."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = 0.2 * rng.standard_normal(shape.shape) + path.endswith("scale")
        return jnp.asarray(value, shape.dtype)

    return map_with_path(leaf, models.abstract(model))


def make(seed=0, **changes):
    model = Llama(LlamaConfig.tiny(**changes))
    return model, random_params(model, seed)


def run(model, params, tokens, **options):
    """The first output of the model, compiled: op by op takes longer than everything else."""
    return jax.jit(partial(model.apply, **options))({"params": params}, tokens)[0]


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (2, 12), 0, 256)


def qkv(batch=2, length=7, heads=6, kv_heads=2, dim=8, keys=None):
    a, b, c = jax.random.split(jax.random.key(1), 3)
    shape = (batch, keys or length, kv_heads, dim)
    q = jax.random.normal(a, (batch, length, heads, dim))
    return q, jax.random.normal(b, shape), jax.random.normal(c, shape)


def test_rotation_scores_depend_on_distance_only():
    rope = Rope(theta=100.0)
    q, k, _ = qkv(kv_heads=6)

    def scores(shift):
        cos, sin = rope.angles(jnp.arange(7)[None] + shift, 8)
        return jnp.einsum("btnh,bsnh->bnts", rotate(q, cos, sin), rotate(k, cos, sin))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)


def test_rope_closed_forms():
    base = Rope(theta=1000.0).inv_freq(8)
    np.testing.assert_allclose(base, 1000.0 ** (-np.arange(0, 8, 2) / 8), rtol=1e-6)
    linear = Rope(kind="linear", theta=1000.0, factor=4.0)
    np.testing.assert_allclose(linear.inv_freq(8), base / 4, rtol=1e-6)
    long = Rope(kind="llama3", theta=1000.0, factor=8.0, original_length=10**9)
    np.testing.assert_allclose(long.inv_freq(8), base, rtol=1e-6)
    short = Rope(kind="llama3", theta=1000.0, factor=8.0, original_length=1)
    np.testing.assert_allclose(short.inv_freq(8), base / 8, rtol=1e-6)
    yarn = Rope(kind="yarn", theta=1000.0, factor=4.0, original_length=16)
    assert yarn.scale() == pytest.approx(0.1 * np.log(4) + 1)
    with pytest.raises(ConfigError, match="nearest: linear"):
        Rope(kind="linaer")
    with pytest.raises(ConfigError, match="original_length"):
        Rope(kind="yarn", factor=2.0)


def test_scan_equals_loop_and_remat_changes_nothing(tokens):
    model, params = make()

    def value(model, params):
        f = lambda p: (model.apply({"params": p}, tokens)[0] ** 2).mean()  # noqa: E731
        loss, grads = jax.jit(jax.value_and_grad(f))(params)
        return float(loss), grads

    loss, grads = value(model, params)
    for remat in ("full", "dots_no_batch"):
        config = LlamaConfig.tiny(remat=remat)
        other, other_grads = value(Llama(config), params)
        assert other == pytest.approx(loss, rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other_grads)
    layers = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(2)}
    separate = {k: v for k, v in params.items() if k != "layers"} | layers
    unrolled = Llama(LlamaConfig.tiny(scan_layers=False))
    loop, loop_grads = value(unrolled, separate)
    assert loop == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(
        loop_grads["layers_1"]["mlp"]["up_proj"]["kernel"],
        grads["layers"]["mlp"]["up_proj"]["kernel"][1],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 4},
        {"sliding_window": 3, "sliding_layers": (False, True)},
        {"scan_layers": False, "sliding_window": 3, "sliding_layers": (False, True)},
        {"qk_norm": True, "qkv_bias": True, "num_key_value_heads": 4},
    ],
)
def test_token_by_token_equals_teacher_forcing(tokens, changes):
    model, params = make(**changes)
    full, none = jax.jit(model.apply)({"params": params}, tokens)
    assert none is None
    cache = model.init_cache(2, 16)
    step = jax.jit(
        lambda t, p, c: model.apply({"params": params}, t, positions=p, cache=c)
    )
    prefill, cache = step(tokens[:, :5], jnp.arange(5)[None].repeat(2, 0), cache)
    np.testing.assert_allclose(prefill, full[:, :5], atol=2e-5)
    for i in range(5, 12):
        out, cache = step(tokens[:, i : i + 1], jnp.full((2, 1), i), cache)
        np.testing.assert_allclose(out[:, 0], full[:, i], atol=2e-5)


def test_packed_sequences_do_not_see_each_other(tokens):
    model, params = make()
    a, b = tokens[:1, :5], tokens[1:, :7]
    packed = jnp.concatenate([a, b], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    out = run(model, params, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(out[:, :5], run(model, params, a), atol=1e-5)
    np.testing.assert_allclose(out[:, 5:], run(model, params, b), atol=1e-5)


def test_hidden_and_head_make_logits(tokens):
    for tied in (False, True):
        model, params = make(tie_word_embeddings=tied)
        assert ("lm_head" in params) is not tied
        hidden = run(model, params, tokens, output="hidden")
        assert hidden.shape == (2, 12, 64)
        logits = model.apply({"params": params}, hidden, method="head")
        np.testing.assert_allclose(logits, run(model, params, tokens), atol=1e-5)


def test_parameter_tree_is_the_documented_one():
    _, params = make(qkv_bias=True, qk_norm=True)
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes == {
        "embed_tokens/embedding": (256, 64),
        "layers/input_layernorm/scale": (2, 64),
        "layers/post_attention_layernorm/scale": (2, 64),
        "layers/self_attn/q_proj/kernel": (2, 64, 64),
        "layers/self_attn/q_proj/bias": (2, 64),
        "layers/self_attn/k_proj/kernel": (2, 64, 32),
        "layers/self_attn/k_proj/bias": (2, 32),
        "layers/self_attn/v_proj/kernel": (2, 64, 32),
        "layers/self_attn/v_proj/bias": (2, 32),
        "layers/self_attn/o_proj/kernel": (2, 64, 64),
        "layers/self_attn/q_norm/scale": (2, 16),
        "layers/self_attn/k_norm/scale": (2, 16),
        "layers/mlp/gate_proj/kernel": (2, 64, 128),
        "layers/mlp/up_proj/kernel": (2, 64, 128),
        "layers/mlp/down_proj/kernel": (2, 128, 64),
        "norm/scale": (64,),
        "lm_head/kernel": (64, 256),
    }


def test_dtype_policy(tokens):
    model, params = make(dtype="bfloat16")
    assert params["norm"]["scale"].dtype == jnp.float32
    out = run(model, params, tokens)
    assert out.dtype == jnp.bfloat16
    wide = run(make()[0], params, tokens)
    assert np.abs(out.astype(jnp.float32) - wide).max() < 0.06 * np.abs(wide).max()
    assert model.init_cache(1, 4)["k"].dtype == jnp.bfloat16
    low, _ = make(param_dtype="bfloat16")
    assert low.config.param_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(models.abstract(low))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_config_survives_hugging_face_form(family):
    changes = {
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "sliding_window": None if family == "llama" else 7,
        "sliding_layers": (False, True) if family.startswith("qwen") else None,
        "eos_token_id": (2, 5),
        "rope": Rope(
            kind="llama3", theta=5e5, factor=8.0, original_length=64, low_freq_factor=1.0
        ),
    }
    config = LlamaConfig.tiny(family=family, **changes)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(LlamaConfig.from_hf(config.to_hf()))


def test_errors_name_the_nearest_choice(tokens):
    with pytest.raises(ConfigError, match="remat 'ful'; nearest: full"):
        LlamaConfig.tiny(remat="ful")
    with pytest.raises(ConfigError, match="multiple"):
        LlamaConfig.tiny(num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="nearest: llama"):
        models.build({"model_type": "lama"})
    model, params = make()
    with pytest.raises(ConfigError, match="nearest: logits"):
        model.apply({"params": params}, tokens, output="logit")
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        models.build({"model_type": "llama", "partial_rotary_factor": 0.5})


def test_smollm2_shapes():
    model = Llama(LlamaConfig.smollm2_135m())
    leaves = jax.tree.leaves(models.abstract(model))
    assert sum(leaf.size for leaf in leaves) == 134_515_008
