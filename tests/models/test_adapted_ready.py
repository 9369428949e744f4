"""Every encoder and small model takes weight leaves: adapted, under jit, scan, remat and grad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.core.paths import flatten
from flora_jax.models import (
    MLP,
    Bert,
    BertConfig,
    ConvNet,
    ConvNetConfig,
    MLPConfig,
    ViT,
    ViTConfig,
    registry,
)

TOKENS = jnp.asarray([[5, 7, 9, 2], [3, 4, 8, 1]])
IMAGES = jax.random.normal(jax.random.key(5), (2, 8, 8, 1))
CASES = {
    "bert": (Bert(BertConfig.tiny(num_labels=3)), TOKENS),
    "bert-remat": (Bert(BertConfig.tiny(num_labels=3, remat="full")), TOKENS),
    "vit": (ViT(ViTConfig.tiny(layerscale_value=0.5)), IMAGES),
    "conv": (ConvNet(ConvNetConfig(image_shape=(8, 8, 1), channels=(4, 6))), IMAGES),
    "mlp": (MLP(MLPConfig(sizes=(64, 16, 10))), IMAGES.reshape(2, 64)),
}
EVERY = r".*/(kernel|embedding)"


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    model, inputs = CASES[request.param]
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    plan = flora.plan(params, {EVERY: flora.LoRA(rank=2, alpha=4)})
    return model, inputs, params, plan


def test_identity_then_lazy_is_dense(case):
    model, inputs, params, plan = case
    assert len(plan) == sum(p.endswith(("kernel", "embedding")) for p in flatten(params))
    adapters = flora.init(plan, jax.random.key(1), params)

    @jax.jit
    def both(adapters):
        bound = flora.bind(params, adapters, plan)
        apply = lambda tree: model.apply({"params": tree}, inputs)
        return apply(bound), apply(flora.materialize(bound))

    plain = jax.jit(model.apply)({"params": params}, inputs)
    np.testing.assert_allclose(both(adapters)[0], plain, atol=1e-5)
    moved = jax.tree.map(lambda a: a + 0.05, adapters)
    lazy, dense = both(moved)
    np.testing.assert_allclose(lazy, dense, atol=2e-4, rtol=1e-3)
    assert not np.allclose(lazy, plain, atol=1e-3)


def test_gradients_reach_every_adapter(case):
    model, inputs, params, plan = case
    adapters = flora.init(plan, jax.random.key(1), params)
    # At init one factor is zero and hides the other's gradient.
    moved = jax.tree.map(lambda a: a + 0.05, adapters)

    @jax.jit
    def grad(adapters):
        def loss(adapters):
            bound = flora.bind(params, adapters, plan)
            return (model.apply({"params": bound}, inputs) ** 2).sum()

        return jax.grad(loss)(adapters)

    for path, leaf in flatten(grad(moved)).items():
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_scanned_and_unrolled_adapters_agree(name):
    """One rule, the same canonical paths: the same adapters whichever way the layers are kept."""
    model, _ = CASES[name]
    flat = model.clone(config=dataclasses.replace(model.config, scan_layers=False))
    rule = {r"layers/.*/(query|value)/kernel": flora.LoRA(rank=2, alpha=4)}
    count = lambda m: sum(e.count for e in flora.plan(registry.abstract(m), rule))
    assert count(model) == count(flat) > 0


def test_a_quantised_base_with_adapters():
    model, inputs = CASES["bert"]
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    low = flora.quantize(params, {r"layers/.*/kernel": flora.Format("int8", block=32)})
    plan = flora.plan(low, {r"layers/.*/kernel": flora.LoRA(rank=2, alpha=4)})
    bound = flora.bind(low, flora.init(plan, jax.random.key(1), low), plan)
    out = jax.jit(model.apply)({"params": bound}, inputs)
    plain = jax.jit(model.apply)({"params": params}, inputs)
    np.testing.assert_allclose(out, plain, atol=0.05)
    assert not np.array_equal(out, plain)
