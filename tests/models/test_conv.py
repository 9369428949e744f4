"""ConvNet: by hand against jax.lax, layouts, pooling, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten
from flora_jax.core.spec import infer
from flora_jax.models import ConvNet, ConvNetConfig, registry
from flora_jax.models.heads import with_head

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
init = jax.jit(registry.init, static_argnums=0)


def make(**changes):
    model = ConvNet(ConvNetConfig(image_shape=(8, 8, 3), channels=(4, 6), **changes))
    return model, init(model, jax.random.key(0))


def test_by_hand():
    model, params = make(readout="flatten", hidden=(5,))
    x = IMAGES
    for name in ("conv_0", "conv_1"):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[name]["bias"])
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    x = x.reshape(2, -1)
    assert x.shape == (2, 2 * 2 * 6)
    x = jax.nn.relu(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, IMAGES), logits, atol=1e-5)
    features = model.apply({"params": params}, IMAGES, output="features")
    np.testing.assert_allclose(features, x, atol=1e-5)


def test_mean_readout_takes_any_size():
    model, params = make(pool_every=0, norm="layer")
    assert model.apply({"params": params}, jnp.ones((1, 5, 7, 3))).shape == (1, 10)


def test_specs_and_head():
    model, params = make()
    kinds = {p: infer(p, leaf.shape).kind for p, leaf in flatten(params).items()}
    assert kinds["conv_0/kernel"] == kinds["conv_1/kernel"] == "conv"
    assert kinds["head/kernel"] == "dense"
    assert kinds["conv_0/bias"] == "vector"
    model, other = with_head(model, params, 3, jax.random.key(1))
    assert model.apply({"params": other}, IMAGES).shape == (2, 3)
    np.testing.assert_array_equal(other["conv_1"]["kernel"], params["conv_1"]["kernel"])


def test_errors():
    with pytest.raises(ConfigError, match="'flat'.*flatten"):
        make(readout="flat")
    with pytest.raises(ConfigError, match="no convolution"):
        ConvNetConfig(channels=())
    model, params = make(readout="flatten")
    with pytest.raises(ConfigError, match="images"):
        model.apply({"params": params}, jnp.ones((1, 4, 8, 3)))
    small = ConvNet(ConvNetConfig(image_shape=(2, 2, 1), channels=(2, 2)))
    with pytest.raises(ConfigError, match="conv_1"):
        init(small, jax.random.key(0))
