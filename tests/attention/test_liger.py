"""The cards of GLA and Liger."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.attention import GLA, Inputs, Liger, Sizes
from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch
from flora_jax.models import registry
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig

TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


def qkv(length=11, heads=4, kv_heads=2, dim=8):
    q, k, v = jax.random.split(jax.random.key(1), 3)
    shape = (2, length, kv_heads, dim)
    q = jax.random.normal(q, (2, length, heads, dim))
    return q, jax.random.normal(k, shape), jax.random.normal(v, shape)


def attend(variant, q, k, v, params=None, x=None):
    inputs = Inputs(x=jnp.zeros((*q.shape[:2], 1)) if x is None else x, q=q, k=k)
    return variant.attend(params or {}, q, k, v, inputs=inputs)[0]


def linear(q, k, v):
    """``o_i = sum_(j <= i) (q_i k_j) v_j`` with every head's keys repeated."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.tril(jnp.einsum("bind,bjnd->bnij", q, k))
    return jnp.einsum("bnij,bjnd->bind", scores, v)


def models(**fields):
    config = LlamaConfig.tiny()
    source = Llama(config)
    params = registry.init(source, jax.random.key(0))
    return source, Llama(dataclasses.replace(config, attention=Liger(**fields))), params


def test_a_converted_model_has_the_parameters_of_its_source():
    source, liger, params = models()
    shapes = lambda model: jax.eval_shape(lambda: registry.init(model, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, shapes(liger)) == jax.tree.map(jnp.shape, shapes(source))
    assert flora.attention.from_json(liger.config.attention.to_json()) == Liger()


def test_the_window_alone_is_the_source_model():
    """Weights (1, 0) and a window no shorter than the text."""
    source, liger, params = models(window=11, weights=(1.0, 0.0))
    logits = [m.apply({"params": params}, TOKENS)[0] for m in (source, liger)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    half = models(window=4, weights=(1.0, 0.0))[1].apply({"params": params}, TOKENS)[0]
    np.testing.assert_allclose(half[:, :4], logits[0][:, :4], atol=1e-5)
    assert np.abs(half[:, 4:] - logits[0][:, 4:]).max() > 1e-3


def test_gates_are_a_root_of_the_sigmoid_of_the_keys():
    q, k, _ = qkv()
    features, keys, decay = Liger().features(q, k)
    np.testing.assert_allclose(jnp.exp(decay), jax.nn.sigmoid(k) ** (1 / 16), rtol=1e-6)
    np.testing.assert_allclose(features.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(keys.sum(-1), 1.0, rtol=1e-6)
    _, keys, decay = Liger(form="hgrn2").features(q, k)
    np.testing.assert_allclose(keys, 1 - jnp.exp(decay), atol=1e-6)


def test_open_gates_make_unnormalised_linear_attention():
    """A constant added to all keys opens the gates and leaves the softmax of the keys alone."""
    q, k, v = qkv()
    out = attend(Liger(weights=(0.0, 1.0)), q, k + 400.0, v)
    wanted = linear(jax.nn.softmax(q), jax.nn.softmax(k), v)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


def test_closed_gates_leave_the_own_token():
    """``0.5 window + 0.5 (q'_t k'_t) v_t`` (HGRN2's gate of keys far below zero)."""
    q, k, v = qkv()
    far = attend(Liger(form="hgrn2", weights=(0.0, 1.0)), q, k - 60.0, v)
    np.testing.assert_allclose(far, jnp.repeat(v, 2, axis=2), rtol=1e-5)
    near = attend(Liger(form="hgrn2", weights=(1.0, 0.0)), q, k - 60.0, v)
    both = attend(Liger(form="hgrn2"), q, k - 60.0, v)
    np.testing.assert_allclose(both, 0.5 * near + 0.5 * far, atol=1e-5)


@pytest.mark.parametrize("form", ["gla", "hgrn2"])
def test_one_state_serves_all_query_heads_of_a_key_head(form):
    """As the official code, which repeats keys, values and gates for every query head."""
    q, k, v = qkv()
    repeated = [jnp.repeat(x, 2, axis=2) for x in (k, v)]
    ours, theirs = attend(Liger(form=form), q, k, v), attend(Liger(form=form), q, *repeated)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_state_has_a_constant_size():
    """A ring of the window and S; a part of weight 0 has none."""
    sizes = Sizes(heads=4, kv_heads=2, dim=8, width=32)
    state = Liger(window=6).init_state(sizes, 3, 10_000, jnp.bfloat16)
    shapes = {name: (x.shape, x.dtype.name) for name, x in state.items()}
    near = ((3, 6, 2, 8), "bfloat16")
    assert shapes == {"k": near, "v": near, "S": ((3, 2, 8, 8), "float32")}
    assert set(Liger(weights=(0, 1)).init_state(sizes, 1, 9, jnp.float32)) == {"S"}
    assert set(Liger(weights=(1, 0)).init_state(sizes, 1, 9, jnp.float32)) == {"k", "v"}


def test_lora_count_of_the_card():
    """Llama-3-8B-like, rank 8 on q, k and v of 32 layers: 4,718,592 trained numbers."""
    kernel = lambda out: {"kernel": jax.ShapeDtypeStruct((32, 4096, out), jnp.bfloat16)}
    layers = {"q_proj": kernel(4096), "k_proj": kernel(1024), "v_proj": kernel(1024)}
    params = {"layers": {"self_attn": layers}}
    plan = flora.plan(params, {".*_proj/kernel": flora.LoRA(rank=8)})
    assert plan.count == 4_718_592


def test_the_count_of_gla_and_its_formula():
    """Gate of low rank, norm and output gate; the card's other terms are the projections."""
    sizes = Sizes(heads=4, kv_heads=4, dim=16, width=64)
    shapes = jax.eval_shape(lambda: GLA().init(jax.random.key(0), sizes, jnp.float32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 16 * (64 + 64) + 64 + 16 + 64 * 64


def test_gla_is_its_recurrence():
    """Token by token in numpy: gate, state, norm, output gate."""
    sizes = Sizes(heads=2, kv_heads=1, dim=4, width=6)
    q, k, v = qkv(length=5, heads=2, kv_heads=1, dim=4)
    x = jax.random.normal(jax.random.key(7), (2, 5, 6))
    params = GLA(rank=3).init(jax.random.key(0), sizes, jnp.float32)
    params["norm"] = jnp.asarray([1.0, 2.0, 0.5, 1.5])
    out = attend(GLA(rank=3), q, k, v, params, x)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for b in range(2):
        state = np.zeros((4, 4))
        for t in range(5):
            token = np.asarray(x[b, t], np.float64)
            gate = sigmoid(token @ p["gate_down"] @ p["gate_up"] + p["gate_bias"]) ** (1 / 16)
            state = gate[:, None] * state + np.outer(k[b, t, 0], v[b, t, 0])
            gated = token @ p["out_gate"]
            gated = (gated * sigmoid(gated)).reshape(2, 4)
            for n in range(2):
                o = 0.5 * q[b, t, n] @ state
                o = o / np.sqrt(np.mean(o**2) + 1e-5) * p["norm"] * gated[n]
                np.testing.assert_allclose(out[b, t, n], o, atol=1e-5)


def test_one_kernel_and_two_ops_are_the_same_attention():
    """Without padding or segments the TPU kernel takes both parts at once."""
    q, k, v = qkv(length=70)
    wanted = attend(Liger(window=5), q, k, v)
    with dispatch.interpret(), dispatch.use("pallas_tpu"):
        np.testing.assert_allclose(attend(Liger(window=5), q, k, v), wanted, atol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="unknown form of Liger 'gsa'; nearest: gla"):
        Liger(form="gsa")
    with pytest.raises(ConfigError, match="window 0"):
        Liger(window=0)
    with pytest.raises(ConfigError, match="weights are of window and recurrence"):
        Liger(weights=(0.0, 0.0))
    with pytest.raises(ConfigError, match="rank 0"):
        GLA(rank=0)
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="Liger reads the layer's q: give inputs"):
        Liger().attend({}, q, k, v)


@pytest.mark.parametrize("variant", [GLA, Liger])
def test_the_chunk_asked_for_reaches_the_kernel(variant):
    q, k, v = qkv(length=16)
    x = jnp.ones((2, 16, 6))
    for chunk, steps in ((4, 4), (8, 2)):
        asked = variant(chunk=chunk)
        params = asked.init(jax.random.key(0), Sizes(heads=4, kv_heads=2, dim=8, width=6), x.dtype)
        jaxpr = jax.make_jaxpr(partial(attend, asked, params=params, x=x))(q, k, v)
        assert f"length={steps}" in str(jaxpr)
