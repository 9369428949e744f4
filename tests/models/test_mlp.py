"""MLP: closed forms, interchange with flax.linen, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.models import MLP, MLPConfig, registry

X = jax.random.normal(jax.random.key(1), (4, 6))
init = jax.jit(registry.init, static_argnums=0)


def test_deep_linear_is_the_product_of_the_kernels():
    model = MLP(MLPConfig(sizes=(6, 5, 4, 3), activation="identity", use_bias=False))
    params = init(model, jax.random.key(0))
    kernels = [params[name]["kernel"] for name in ("dense_0", "dense_1", "head")]
    product = kernels[0] @ kernels[1] @ kernels[2]
    np.testing.assert_allclose(model.apply({"params": params}, X), X @ product, atol=1e-5)


def test_layers_by_hand():
    model = MLP(MLPConfig(sizes=(6, 5, 3), norm="layer", activation="gelu"))
    params = init(model, jax.random.key(0))
    first, features, last = params["dense_0"], None, params["head"]
    z = X @ first["kernel"] + first["bias"]
    z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-6)
    features = jax.nn.gelu(z, approximate=False)
    logits = features @ last["kernel"] + last["bias"]
    layers = model.apply({"params": params}, X, output="layers")
    np.testing.assert_allclose(layers[0], features, atol=1e-5)
    np.testing.assert_allclose(layers[1], logits, atol=1e-5)
    out = model.apply({"params": params}, X, output="features")
    np.testing.assert_array_equal(out, layers[0])


def test_parameters_are_those_of_flax():
    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(5, name="dense_0")(x)))

    params = Theirs().init(jax.random.key(0), X)
    ours = MLP(MLPConfig(sizes=(6, 5, 3)))
    np.testing.assert_allclose(ours.apply(params, X), Theirs().apply(params, X), atol=1e-6)


def test_init_std_and_hash():
    config = MLPConfig(sizes=[100, 200, 3], init_std=0.5)
    assert hash(config) == hash(MLPConfig(sizes=(100, 200, 3), init_std=0.5))
    kernel = init(MLP(config), jax.random.key(0))["dense_0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.5, rtol=0.02)


def test_errors():
    with pytest.raises(ConfigError, match="sizes"):
        MLPConfig(sizes=(3,))
    with pytest.raises(ConfigError, match="'rleu'.*relu"):
        MLPConfig(activation="rleu")
    model = MLP(MLPConfig(sizes=(6, 3)))
    with pytest.raises(ConfigError, match=r"sizes\[0\]=6"):
        model.init(jax.random.key(0), jnp.ones((2, 5)))
