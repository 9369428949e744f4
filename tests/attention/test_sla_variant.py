"""SLA as a variant: its parameters, what it is not defined for, the kernel behind it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.attention import SLA, Causal, Full, Sizes, from_json
from flora_jax.core.errors import ConfigError
from flora_jax.kernels.sla import sla

VARIANT = SLA(variant="paper", critical=0.3, negligible=0.3, block_q=4, block_k=4)
SIZES = Sizes(heads=4, kv_heads=2, dim=8, width=32)


def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, 22, n, 8)) for k, n in zip(keys, (4, 2, 2))]


def test_a_model_of_30_layers_of_wan_gains_495360_parameters():
    sizes = Sizes(heads=12, kv_heads=12, dim=128, width=1536)
    params = jax.eval_shape(lambda key: SLA().init(key, sizes, jnp.float32), jax.random.key(0))
    assert 30 * sum(x.size for x in jax.tree.leaves(params)) == 495_360


def test_is_the_kernel():
    params = VARIANT.init(jax.random.key(0), SIZES, jnp.float32)
    assert not any(np.any(x) for x in jax.tree.leaves(params))
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    out, state = VARIANT.attend(params, *qkv(), mask=Full(), scale=0.2)
    assert state is None
    expected = sla(*qkv(), params["proj"], VARIANT.config(), scale=0.2)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_an_adapted_projection_is_its_sum():
    """Not folded into the state as a plain one is: an adapter sees the tokens."""
    variant = dataclasses.replace(VARIANT, variant="main")
    draw = lambda tree: jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), tree)
    params = draw(variant.init(jax.random.key(0), SIZES, jnp.float32))
    plan = flora.plan(params, {"proj/kernel": flora.LoRA(rank=2)})
    bound = flora.bind(params, draw(flora.init(plan, jax.random.key(0), params)), plan)
    got, expected = (
        variant.attend(params, *qkv(), mask=Full())[0]
        for params in (bound, flora.materialize(bound))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_is_not_defined_for_causal_masks_and_text():
    with pytest.raises(ConfigError, match="SLA takes Full masks, not Causal"):
        VARIANT.attend({}, *qkv(), mask=Causal())
    with pytest.raises(ConfigError, match="cannot generate"):
        VARIANT.attend({}, *qkv(), mask=Full(), mode="prefill")
    with pytest.raises(ConfigError, match="not defined with segment_ids"):
        VARIANT.attend({}, *qkv(), mask=Full(), segment_ids=jnp.zeros((2, 22), jnp.int32))


def test_comes_back_from_json_and_refuses_bad_values():
    assert from_json(VARIANT.to_json()) == VARIANT
    with pytest.raises(ConfigError, match="unknown SLA variant 'sla'; nearest: sla1"):
        SLA(variant="sla")
