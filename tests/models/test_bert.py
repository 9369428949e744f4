"""BERT: masks, poolings, scan against unrolled, remat, dropout, dtypes, configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.paths import flatten, unflatten
from flora_jax.core.spec import infer
from flora_jax.models import Bert, BertConfig, registry
from flora_jax.models.bert import mean_pool
from flora_jax.models.heads import with_head

TOKENS = jnp.asarray([[5, 7, 9, 11, 13, 2], [3, 4, 8, 1, 0, 0]])
MASK = jnp.asarray([[1] * 6, [1, 1, 1, 0, 0, 0]])
init = jax.jit(registry.init, static_argnums=0)


@pytest.fixture(scope="module")
def tiny():
    model = Bert(BertConfig.tiny(num_labels=3))
    return model, init(model, jax.random.key(0))


def scramble(params):
    """Random values everywhere, so that a swapped bias or scale shows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def unrolled(params):
    """The same parameters for ``scan_layers=False``."""
    out = {}
    for path, leaf in flatten(params).items():
        if path.startswith("layers/"):
            for i, part in enumerate(leaf):
                out[f"layers_{i}/{path.removeprefix('layers/')}"] = part
        else:
            out[path] = leaf
    return unflatten(out)


def test_paths_and_specs(tiny):
    shapes = {path: leaf.shape for path, leaf in flatten(tiny[1]).items()}
    assert shapes["layers/attention/self/query/kernel"] == (2, 32, 32)
    assert shapes["layers/attention/output/dense/kernel"] == (2, 32, 32)
    assert shapes["layers/intermediate/dense/kernel"] == (2, 32, 64)
    assert shapes["layers/output/dense/kernel"] == (2, 64, 32)
    assert shapes["embeddings/word_embeddings/embedding"] == (100, 32)
    assert shapes["classifier/kernel"] == (32, 3)
    specs = {path: infer(path, shape) for path, shape in shapes.items()}
    assert {p for p, s in specs.items() if s.kind == "embedding"} == {
        f"embeddings/{name}_embeddings/embedding" for name in ("word", "position", "token_type")
    }
    assert {s.kind for p, s in specs.items() if p.endswith("kernel")} == {"dense"}
    assert all((s.stack_ndim == 1) == p.startswith("layers/") for p, s in specs.items())


def test_padding_changes_nothing(tiny):
    model, params = tiny
    whole = model.apply({"params": params}, TOKENS, MASK, output="hidden")
    short = model.apply({"params": params}, TOKENS[1:, :3], output="hidden")
    np.testing.assert_allclose(whole[1, :3], short[0], atol=1e-6)
    means = model.apply({"params": params}, TOKENS, MASK, output="mean")
    np.testing.assert_allclose(means[1], short[0].mean(0), atol=1e-6)


def test_outputs_agree(tiny):
    model, params = tiny
    names = ("hidden", "layers", "cls", "pooler", "logits")
    apply = lambda name: model.apply({"params": params}, TOKENS, MASK, output=name)
    call = jax.jit(lambda: {name: apply(name) for name in names})().get
    hidden, layers = call("hidden"), call("layers")
    assert layers.shape == (3, 2, 6, 32)
    np.testing.assert_allclose(layers[-1], hidden, atol=1e-6)
    np.testing.assert_array_equal(call("cls"), hidden[:, 0])
    dense = params["pooler"]["dense"]
    pooled = jnp.tanh(hidden[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(call("pooler"), pooled, atol=1e-6)
    head = params["classifier"]
    np.testing.assert_allclose(call("logits"), pooled @ head["kernel"] + head["bias"], atol=1e-6)


def test_mean_pool_of_an_empty_row_is_zero():
    assert mean_pool(jnp.ones((1, 3, 2)), jnp.zeros((1, 3))).tolist() == [[0.0, 0.0]]


def value_and_grad(model, params):
    def loss(params):
        return (model.apply({"params": params}, TOKENS, MASK) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def reference(tiny):
    model, params = tiny
    params = scramble(params)
    return params, *value_and_grad(model, params)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_and_remat_change_nothing(tiny, reference, changes):
    model, (params, value, grad) = tiny[0], reference
    layout = (lambda tree: tree) if changes.get("scan_layers", True) else unrolled
    other = model.clone(config=dataclasses.replace(model.config, **changes))
    value2, grad2 = value_and_grad(other, layout(params))
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    for path, leaf in flatten(layout(grad)).items():
        np.testing.assert_allclose(leaf, flatten(grad2)[path], atol=2e-4, rtol=1e-4, err_msg=path)


def test_dropout_only_when_training(tiny):
    model, params = tiny
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    wet = model.clone(config=dataclasses.replace(model.config, **rates))
    plain = model.apply({"params": params}, TOKENS, MASK)
    np.testing.assert_array_equal(wet.apply({"params": params}, TOKENS, MASK), plain)

    @jax.jit
    def draw(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return wet.apply({"params": params}, TOKENS, MASK, train=True, rngs=rngs)

    assert not np.allclose(draw(0), draw(1))
    np.testing.assert_array_equal(draw(0), draw(0))


def test_bfloat16_policy(tiny):
    model, params = tiny
    low = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    out = low.apply({"params": params}, TOKENS, MASK)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32), model.apply({"params": params}, TOKENS, MASK), atol=0.05
    )
    small = Bert(BertConfig.tiny(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(registry.abstract(small))} == {
        jnp.dtype("bfloat16")
    }


def test_config_round_trip():
    for config in (
        BertConfig.tiny(),
        BertConfig.tiny(num_labels=2),
        BertConfig.tiny(num_labels=5, pooling="mean", use_pooler=False),
    ):
        assert BertConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BertConfig.tiny(num_attention_heads=5), "num_attention_heads=5"),
        (lambda: BertConfig.tiny(pooling="means"), "'means'.*mean"),
        (lambda: BertConfig.tiny(hidden_act="gelo"), "'gelo'.*gelu"),
        (lambda: BertConfig.tiny(remat="ful"), "'ful'.*full"),
        (lambda: BertConfig.tiny(num_labels=2, use_pooler=False), "use_pooler"),
        (lambda: BertConfig.from_hf({"model_type": "gpt2"}), "gpt2"),
        (
            lambda: BertConfig.from_hf(
                {"model_type": "bert", "position_embedding_type": "relative_key"}
            ),
            "relative_key",
        ),
    ],
)
def test_wrong_configs_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_wrong_calls_are_named(tiny):
    model, params = tiny
    with pytest.raises(StructureError, match="41 tokens"):
        model.apply({"params": params}, jnp.ones((1, 41), jnp.int32))
    with pytest.raises(ConfigError, match="hiden.*hidden"):
        model.apply({"params": params}, TOKENS, output="hiden")
    with pytest.raises(ConfigError, match="num_labels"):
        Bert(BertConfig.tiny()).apply({"params": params}, TOKENS, output="logits")


def test_with_head_keeps_the_body(tiny):
    model, params = tiny
    new, other = with_head(model, params, 7, jax.random.key(3), pooling="mean", use_pooler=False)
    assert "pooler" not in other
    assert other["classifier"]["kernel"].shape == (32, 7)
    np.testing.assert_array_equal(other["classifier"]["bias"], 0)
    assert other["layers"] == params["layers"]
    assert new.apply({"params": other}, TOKENS, MASK).shape == (2, 7)
    again = with_head(model, params, 3, jax.random.key(3))[1]
    assert not np.allclose(again["classifier"]["kernel"], params["classifier"]["kernel"])
    assert "classifier" not in with_head(model, params, 0, jax.random.key(3))[1]
    with pytest.raises(StructureError, match="pooler/dense"):
        with_head(new, other, 7, jax.random.key(0), pooling="pooler", use_pooler=True)
