"""The card of sparse-linear attention: three variants against dense masks, and its checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.kernels.sla import SLAConfig, branches, linear, reference, sla
from flora_jax.kernels.sla.blocks import classify
from flora_jax.kernels.sla.config import VARIANTS

CFG = SLAConfig(critical=0.3, negligible=0.3, block_q=8, block_k=4)


def problem(tokens=37, heads=4, key_heads=2, width=8, dtype="float32", seed=0):
    a, b, c, d, e = jax.random.split(jax.random.key(seed), 5)
    draw = lambda key, n: jax.random.normal(key, (1, tokens, n, width)).astype(dtype)
    q, k, v = draw(a, heads), draw(b, key_heads), draw(c, key_heads)
    kernel, bias = jax.random.normal(d, (width, width)), jax.random.normal(e, (width,))
    return q, k, v, {"kernel": kernel, "bias": bias}


def config(variant, **changes):
    return dataclasses.replace(CFG, variant=variant, **changes)


def only_all(q, k, v, cfg):
    """The linear branch over all keys."""
    return linear.main(linear.Call(cfg=cfg), q, k, v, None, None)


def ratio(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.isfinite(x).all()
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


def value_and_gradients(f, arguments, cfg):
    def loss(*arguments):
        o = f(*arguments, cfg).astype(jnp.float32)
        # Cotangents that bfloat16 holds exactly: their sum, the bias's gradient, nearly cancels.
        weights = jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(jnp.bfloat16)
        return jnp.sum(o * weights), o

    (_, o), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arguments)
    return o, jax.tree.leaves(grads)


@pytest.mark.parametrize("features", ["softmax", "relu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_five_gradients_equal_dense_masks(variant, features):
    """Tails of both kinds, two query heads per key head."""
    cfg = config(variant, features=features)
    o, grads = value_and_gradients(sla, problem(), cfg)
    expected, exact = value_and_gradients(reference.sla, problem(), cfg)
    np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-5)
    for x, y in zip(grads, exact):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant):
    arguments = problem(dtype="bfloat16")
    exact = (*(x.astype(jnp.float32) for x in arguments[:3]), arguments[3])
    o, grads = value_and_gradients(sla, arguments, config(variant))
    expected, exact = value_and_gradients(reference.sla, exact, config(variant))
    assert ratio(o, expected) < 5e-3
    for x, y in zip(grads, exact):
        assert ratio(x, y) < 8e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_blocks_critical_is_softmax(variant):
    """Of ``main`` with the projection at zero; the others have nothing left for it to see."""
    q, k, v, params = problem()
    kernel = 0 * params["kernel"] if variant == "main" else params["kernel"]
    params = {"kernel": kernel, "bias": 0 * params["bias"]}
    o = sla(q, k, v, params, config(variant, critical=1.0))
    np.testing.assert_allclose(o, jax.nn.dot_product_attention(q, k, v), atol=1e-5)


def test_starts_as_the_sparse_branch_and_one_step_moves_the_projection():
    q, k, v, params = problem()
    params = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(sla(q, k, v, params, CFG), branches(q, k, v, CFG)[0])
    loss = lambda q, params: jnp.sum(jnp.square(sla(q, k, v, params, CFG)))
    dq, grads = jax.grad(loss, (0, 1))(q, params)
    assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(grads))
    sparse = jax.grad(lambda q: jnp.sum(jnp.square(branches(q, k, v, CFG)[0])))(q)
    np.testing.assert_allclose(dq, sparse, atol=1e-6)  # nothing passes a projection of zeros


def test_a_constant_added_to_all_keys_moves_no_block():
    q, k, _, _ = problem()
    table, marginal = classify(q, k, config("paper"))
    shifted, moved = classify(q, k + 3 * jnp.arange(8.0), config("paper"))
    np.testing.assert_array_equal(table, shifted)
    np.testing.assert_array_equal(marginal, moved)


def test_paper_without_negligible_blocks_is_sla1():
    arguments = problem()
    np.testing.assert_array_equal(
        sla(*arguments, config("paper", negligible=0.0)), sla(*arguments, config("sla1"))
    )


def test_main_is_an_all_marginal_map():
    q, k, v, _ = problem()
    table, marginal = classify(q, k, config("sla1"))
    got = linear.over_marginal(q, k, v, jnp.ones_like(marginal), CFG)
    np.testing.assert_allclose(only_all(q, k, v, CFG), got, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "sla1"])
def test_classes_are_disjoint_and_complete_even_with_equal_scores(variant):
    q, k, _, _ = problem()
    table, marginal = classify(q, jnp.zeros_like(k), config(variant))
    critical, negligible = config(variant).counts(10)
    assert (critical, negligible) == ((3, 3) if variant == "paper" else (3, 0))
    assert table.shape == (1, 4, 5, 3) and (np.diff(table, axis=-1) > 0).all()
    assert (marginal.sum(axis=-1) == 10 - critical - negligible).all()
    assert not np.take_along_axis(np.asarray(marginal), np.asarray(table), axis=-1).any()


def test_at_least_one_block_is_critical():
    assert SLAConfig(critical=0.0).counts(8) == (1, 0)
    assert SLAConfig(variant="paper", critical=1.0, negligible=0.5).counts(8) == (8, 0)


def clustered(tokens=256, width=16, clusters=16, seed=0):
    """Keys and queries in clusters that lie together, so that blocks differ in weight."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width)) * 1.5
    place = np.repeat(np.arange(clusters), tokens // clusters)
    q, k = (centres[place] + rng.normal(size=(tokens, width)) for _ in range(2))
    v = rng.normal(size=(clusters, width))[place] + rng.normal(size=(tokens, width))
    return [jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_and_linear_beats_sparse_beats_linear(variant):
    """The card's instant check: error against full attention, the projection by least squares."""
    q, k, v = clustered()
    cfg = SLAConfig(variant=variant, critical=0.25, negligible=0.1, block_q=16, block_k=16)
    full = jax.nn.dot_product_attention(q, k, v)[0, :, 0]
    sparse, low = (np.asarray(x)[0, :, 0] for x in branches(q, k, v, cfg))
    inputs = np.concatenate([low, np.ones((low.shape[0], 1))], axis=1)
    both = sparse + inputs @ np.linalg.lstsq(inputs, np.asarray(full) - sparse, rcond=None)[0]
    only_linear = np.asarray(only_all(q, k, v, cfg))[0, :, 0]
    both, sparse, low = (np.linalg.norm(x - full) for x in (both, sparse, only_linear))
    assert both < sparse < low


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"variant": "SLA"}, "unknown SLA variant 'SLA'; nearest"),
        ({"features": "hedgehog"}, "unknown SLA feature map 'hedgehog'"),
        ({"critical": 5.0}, r"critical=5.0: a share in \[0, 1\]"),
        ({"block_k": 0}, "blocks 128 x 0"),
    ],
)
def test_bad_values_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        SLAConfig(**bad)


def test_memory_grows_with_the_length_not_its_square():
    """At a fixed number of critical blocks the map of blocks is all that grows faster."""

    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        cfg = SLAConfig(variant="sla1", critical=128 / tokens, block_q=64, block_k=64)
        params = {"kernel": jnp.zeros((16, 16)), "bias": jnp.zeros(16)}
        loss = lambda q, k, v: sla(q, k, v, params, cfg).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(8192)
    assert large < 5 * small
    assert large < 8192 * 8192
