"""Losses against optax and closed forms; the chunked head against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import MLP, Stream, TinyLM, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.core.errors import ConfigError

B, T, D, V = 3, 10, 8, 32


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = jax.random.uniform(keys[3], (B, T)).round(1)
    return hidden, head, targets, mask


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 10, 99])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_chunked_equals_optax_in_value_and_gradient(problem, chunk, extra):
    hidden, head, targets, mask = problem

    def ours(h, w):
        return training.chunked_cross_entropy(
            lambda x: x @ w, h, targets, mask, chunk=chunk, **extra
        )[0]

    def reference(h, w):
        logits, smooth = h @ w, extra.get("label_smoothing", 0.0)
        labels = optax.smooth_labels(jax.nn.one_hot(targets, V), smooth)
        loss = optax.softmax_cross_entropy(logits, labels)
        loss += extra.get("z_loss", 0.0) * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(mask * loss)

    a, b = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (ours, reference))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


def test_weight_and_aux_are_sums(problem):
    hidden, head, targets, mask = problem
    logits = hidden @ head
    total, weight, aux = training.chunked_cross_entropy(
        lambda x: x @ head, hidden, targets, mask, chunk=3
    )
    np.testing.assert_allclose(weight, mask.sum(), rtol=1e-6)
    right = (mask * (logits.argmax(-1) == targets)).sum()
    np.testing.assert_allclose(aux["accuracy"], right, rtol=1e-5)
    np.testing.assert_allclose(aux["nll"], total, rtol=1e-6)


def test_masked_positions_may_be_infinite(problem):
    hidden, head, targets, _ = problem
    mask = jnp.ones((B, T)).at[0, 0].set(0.0)
    spoiled = hidden.at[0, 0].set(jnp.inf)
    f = lambda h: training.chunked_cross_entropy(lambda x: x @ head, h, targets, mask, chunk=5)[0]  # noqa: E731
    np.testing.assert_allclose(f(spoiled), f(hidden), rtol=1e-6)


@pytest.mark.optimised
def test_chunks_never_hold_all_logits():
    hidden = jax.ShapeDtypeStruct((2, 256, 16), jnp.float32)
    head = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 256), jnp.float32)

    def temporaries(chunk):
        def loss(h, w, t, m):
            return training.chunked_cross_entropy(lambda x: x @ w, h, t, m, chunk=chunk)[0]

        step = jax.jit(jax.grad(loss))
        return training.compiled_cost(step, hidden, head, ids, mask)["temp_bytes"]

    logits = 2 * 256 * 4096 * 4
    assert temporaries(None) >= logits
    assert temporaries(16) < 0.3 * logits


def test_bad_chunk(problem):
    hidden, head, targets, mask = problem
    with pytest.raises(ConfigError, match="chunk=0"):
        training.chunked_cross_entropy(lambda x: x @ head, hidden, targets, mask, chunk=0)


def test_causal_lm_reads_the_batch():
    loss, base, plan, adapters = language_model()
    batch = next(Stream())
    total, weight, _ = loss(flora.bind(base, adapters, plan), batch, None, False)
    logits, _ = TinyLM().apply({"params": base}, batch["tokens"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    np.testing.assert_allclose(total, (nll * batch["loss_mask"]).sum(), rtol=1e-5)
    bare = {k: v for k, v in batch.items() if k != "loss_mask"}
    assert loss(base, bare, None, False)[1] == batch["targets"].size


def test_classification_and_its_padding_rows():
    model = MLP()
    x = jax.random.normal(jax.random.key(0), (6, 5))
    base = model.init(jax.random.key(1), x)["params"]
    labels = jnp.array([0, 1, 2, 3, 0, 1])
    loss = training.Classification(model=model, inputs=("image",), label_smoothing=0.2)
    weight = jnp.array([1.0, 1, 1, 1, 0, 0])
    got = loss(base, {"image": x, "label": labels, "weight": weight}, None, False)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.2)
    logits = model.apply({"params": base}, x)
    expected = optax.softmax_cross_entropy(logits, smooth)[:4].sum()
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)
    assert got[1] == 4
    assert got[2]["accuracy"] == (logits.argmax(-1) == labels)[:4].sum()
    with pytest.raises(ConfigError, match="unknown batch key 'label'; nearest: lable"):
        loss(base, {"image": x, "lable": labels}, None, False)


@pytest.mark.parametrize("huber", [None, 0.5])
def test_regression(huber):
    model = MLP(classes=1)
    x, y = jax.random.normal(jax.random.key(0), (6, 5)), jnp.arange(6.0)
    base = model.init(jax.random.key(1), x)["params"]
    loss = training.Regression(model=model, huber=huber)
    total, weight, aux = loss(base, {"x": x, "y": y}, None, False)
    out = model.apply({"params": base}, x)[:, 0]
    each = (out - y) ** 2 if huber is None else optax.huber_loss(out, y, delta=huber)
    np.testing.assert_allclose(total, each.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["mae"], jnp.abs(out - y).sum(), rtol=1e-5)
    assert weight == 6
    with pytest.raises(ConfigError, match=r"target 'y' \(3,\) does not fit"):
        loss(base, {"x": x, "y": y[:3]}, None, False)
