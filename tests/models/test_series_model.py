"""The quantum cells as Linen modules: the cell's own tree and outputs, adapters, NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flora_jax as flora
from flora_jax.attention.quantum import QFWP, QRNNReservoir, StaticVQC
from flora_jax.models import SeriesModel
from flora_jax.models import registry as models

CELLS = [QFWP(qubits=3, measured=2), StaticVQC(qubits=3, measured=2), QRNNReservoir(hidden=2)]
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 1)), jnp.float32)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_the_module_is_the_cell(cell):
    model = SeriesModel(cell)
    params = models.init(model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, cell.init(jax.random.key(0)))
    got = jax.jit(model.apply)({"params": params}, X)
    want = jax.jit(cell.apply)(params, X)[0][:, -1]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_adapters_on_the_slow_programmer():
    """A LoRA of its kernels is the merged kernel, and gets a gradient through the circuits."""
    model = SeriesModel(CELLS[0])
    params = models.init(model, jax.random.key(0))
    plan = flora.plan(params, {"(depth|qubit)/kernel": flora.LoRA(rank=1)})
    adapters = jax.tree.map(lambda x: x + 0.3, flora.init(plan, jax.random.key(1), params))
    run = jax.jit(lambda a: model.apply({"params": flora.bind(params, a, plan)}, X))
    merged = flora.materialize(flora.bind(params, adapters, plan))
    want = jax.jit(model.apply)({"params": merged}, X)
    np.testing.assert_allclose(run(adapters), want, atol=1e-5)
    assert not np.allclose(run(adapters), jax.jit(model.apply)({"params": params}, X), atol=1e-3)
    grads = jax.jit(jax.grad(lambda a: jnp.sum(run(a) ** 2)))(adapters)
    assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


def test_in_nnx():
    model = nnx.bridge.ToNNX(SeriesModel(CELLS[0]), rngs=nnx.Rngs(0)).lazy_init(X)
    assert model(X).shape == (2, 1)
    assert model.encoder["kernel"].shape == (1, 3)
