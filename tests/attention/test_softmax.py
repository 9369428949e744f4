"""The card of softmax attention: every implementation against jax, masks, cache, sharp edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.attention import Causal, Dropout, Full, Prefix, Sizes, Sliding, Softmax
from flora_jax.attention.softmax import IMPLEMENTATIONS
from flora_jax.core.errors import ConfigError

SIZES = Sizes(heads=6, kv_heads=2, dim=8, width=48)


def qkv(batch=2, length=7, heads=6, kv_heads=2, dim=8):
    a, b, c = jax.random.split(jax.random.key(1), 3)
    shape = (batch, length, kv_heads, dim)
    q = jax.random.normal(a, (batch, length, heads, dim))
    return q, jax.random.normal(b, shape), jax.random.normal(c, shape)


def attend(q, k, v, *, implementation="grouped", **call):
    variant = Softmax(implementation=implementation, chunk=3)
    return jax.jit(lambda q, k, v: variant.attend({}, q, k, v, **call)[0])(q, k, v)


def reference(q, k, v, mask=None):
    mask = None if mask is None else jnp.asarray(mask)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_jax(kv_heads, implementation):
    q, k, v = qkv(kv_heads=kv_heads)
    for mask in (Causal(), Full()):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=mask.causal)
        out = attend(q, k, v, mask=mask, implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_grouped_heads_equal_repeated_keys():
    q, k, v = qkv()
    repeated = attend(q, k.repeat(3, axis=2), v.repeat(3, axis=2))
    np.testing.assert_allclose(attend(q, k, v), repeated, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_jax(implementation):
    args = qkv()

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)))(*args)

    ours = gradients(partial(attend, implementation=implementation))
    theirs = gradients(partial(jax.nn.dot_product_attention, is_causal=True))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_equal_dense_ones(implementation):
    q, k, v = qkv()
    i, j = np.arange(7)[:, None], np.arange(7)[None]
    run = partial(attend, q, k, v, implementation=implementation)
    for window in (1, 3, 100):
        expected = reference(q, k, v, (j <= i) & (i - j < window))
        np.testing.assert_allclose(run(mask=Sliding(window)), expected, atol=2e-6)
        # Inside a scan over layers the window is an array.
        np.testing.assert_allclose(run(mask=Sliding(jnp.int32(window))), expected, atol=2e-6)
    expected = reference(q, k, v, (j <= i) | (j < 4))
    np.testing.assert_allclose(run(mask=Prefix(4)), expected, atol=2e-6)


def test_a_constant_added_to_all_keys_changes_nothing():
    q, k, v = qkv()
    np.testing.assert_allclose(attend(q, k, v), attend(q, k + 3.0, v), atol=5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_not_seen_and_a_row_without_keys_gives_zero(implementation):
    q, k, v = qkv()
    valid = jnp.asarray([[1] * 5 + [0] * 2, [0] * 7])
    out = attend(q, k, v, mask=Full(), valid=valid, implementation=implementation)
    np.testing.assert_allclose(out[:1], reference(q[:1], k[:1, :5], v[:1, :5]), atol=2e-6)
    assert (out[1] == 0).all()
    loss = lambda *a: attend(*a, mask=Full(), valid=valid, implementation=implementation).sum()
    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1, 2))(q, k, v))


def test_dropout_of_the_probabilities():
    """Kept ones are scaled up; the mean over draws is the attention without."""
    q, k, v = qkv(batch=1)

    @jax.jit
    @jax.vmap
    def draw(key):
        return Softmax().attend({}, q, k, v, mask=Full(), dropout=Dropout(0.5, key))[0]

    draws = draw(jax.random.split(jax.random.key(0), 1000))
    assert draws.std(axis=0).min() > 0
    np.testing.assert_allclose(draws.mean(axis=0), attend(q, k, v, mask=Full()), atol=0.16)
    nearly_none = Softmax().attend({}, q, k, v, dropout=Dropout(1e-9, jax.random.key(0)))[0]
    np.testing.assert_allclose(nearly_none, attend(q, k, v), atol=1e-5)


def test_a_window_in_blocks_equals_a_mask():
    """Beyond two blocks of 64 the grouped form touches the window's keys only."""
    q, k, v = qkv(length=200, batch=1, heads=2, kv_heads=1)
    i, j = np.arange(200)[:, None], np.arange(200)[None]
    for window in (3, 70):
        expected = reference(q, k, v, (j <= i) & (i - j < window))
        np.testing.assert_allclose(attend(q, k, v, mask=Sliding(window)), expected, atol=2e-6)


def test_a_window_keeps_a_ring():
    state = Softmax().init_state(SIZES, 2, 100, jnp.bfloat16, Sliding(4))
    assert state["k"].shape == (2, 4, 2, 8) and state["k"].dtype == jnp.bfloat16
    assert Softmax().init_state(SIZES, 2, 3, jnp.bfloat16, Sliding(4))["k"].shape[1] == 3
    assert Softmax().init_state(SIZES, 2, 100, jnp.bfloat16)["k"].shape[1] == 100


def test_bfloat16_sums_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(length=64))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_errors_name_the_nearest():
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="nearest: grouped"):
        Softmax(implementation="groupd")
    with pytest.raises(ConfigError, match="nearest: train"):
        Softmax().attend({}, q, k, v, mode="trian")
    with pytest.raises(ConfigError, match="needs a state and positions"):
        Softmax().attend({}, q, k, v, mode="decode")
