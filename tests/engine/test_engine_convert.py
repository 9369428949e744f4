"""Conversion of stacks, several adapters and biases; extraction from checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.core.errors import ConfigError, PlanError, RuleError, StructureError
from flora_jax.core.paths import flatten
from flora_jax.engine.compress import Target, from_matrix


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def stacked_params():
    layers = {
        "q_proj": {"kernel": r(3, 8, 8), "bias": r(3, 8)},
        "up": {"kernel": r(3, 8, 12)},
        "norm": {"scale": r(3, 8)},
    }
    return {"layers": layers, "embed": {"embedding": r(9, 8)}}


def trained(params, rules, seed=0):
    plan = flora.plan(params, rules)
    train, frozen = flora.partition(flora.init(plan, jax.random.key(seed), params), plan)
    moved = jax.tree.map(lambda a: a + 0.3 * r(*a.shape, seed=seed), train)
    return plan, flora.combine(moved, frozen)


def same(a, b, atol=1e-4):
    a, b = flatten(a), flatten(b)
    assert set(a) == set(b)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=atol, err_msg=path)


MIX = {
    "layers/q_proj/kernel": flora.Hydra(rank_parallel=2, rank_sequential=1, use_bias=True),
    "layers/up/kernel": flora.FLoRA(ranks=2),
    "embed/embedding": flora.LoRA(rank=2),
    "layers/norm/scale": flora.Replace(),
}


def test_stacks_biases_and_replaced_vectors():
    params = stacked_params()
    plan, adapters = trained(params, MIX)
    converted, arrays, report = flora.to_lora(params, adapters, plan)
    expected = flora.materialize(flora.bind(params, adapters, plan))
    same(flora.materialize(flora.bind(params, arrays, converted)), expected)
    assert arrays["layers/q_proj/kernel"]["a"].shape == (3, 8, 3)
    assert report["layers/q_proj/kernel"].bias and report["layers/norm/scale"].form == "replace"
    assert report.error == 0.0 and "exact" in report.table()
    assert flora.Plan.from_json(converted.to_json()) == converted


def test_one_rank_for_a_stack_is_that_of_the_neediest_layer():
    params = {"layers": {"kernel": jnp.zeros((3, 10, 8))}}
    change = jnp.stack([r(10, k) @ r(k, 8) for k in (1, 4, 2)])
    plan = flora.plan(
        params, {".*": flora.Replace()}, specs={".*": flora.KernelSpec.dense(stack_ndim=1)}
    )
    _, arrays, report = flora.to_lora(
        params, {"layers/kernel": {"value": change}}, plan, error=1e-3
    )
    assert report["layers/kernel"].rank == 4 and report["layers/kernel"].error < 1e-3
    np.testing.assert_allclose(
        arrays["layers/kernel"]["a"] @ arrays["layers/kernel"]["b"], change, atol=1e-4
    )


def test_weighted_adapters_of_two_methods_become_one():
    params = stacked_params()
    plans, trees = {}, {}
    plans["a"], trees["a"] = trained(params, {"layers/q_proj/kernel": flora.VeRA(rank=2)})
    plans["b"], trees["b"] = trained(params, MIX, seed=1)
    weights = {"a": 0.5, "b": -2.0}
    converted, arrays, report = flora.to_lora(params, trees, plans, weights=weights)
    expected = flora.materialize(flora.bind(params, trees, plans, weights=weights))
    same(flora.materialize(flora.bind(params, arrays, converted)), expected)
    assert report["layers/q_proj/kernel"].rank == 2 + 2 + 1


def test_a_bias_that_is_replaced_beside_an_adapter_that_scales_it():
    """bind: each set's own bias, then what its kernel's adapter does to that."""
    params = {"kernel": r(6, 4), "bias": r(4)}
    rules = {"kernel": flora.IA3(), "bias": flora.Replace()}
    plan, adapters = trained(params, rules)
    l, bias = adapters["kernel"]["l"], adapters["bias"]["value"]
    for order in (plan, flora.Plan(plan.entries[::-1])):
        merged = flora.materialize(flora.bind(params, adapters, order))
        np.testing.assert_allclose(merged["bias"], bias * l, rtol=1e-6)
        two = flora.bind(params, {"x": adapters}, order, weights=[0.5])
        expected = params["bias"] + 0.5 * (bias * l - params["bias"])
        np.testing.assert_allclose(flora.materialize(two)["bias"], expected, atol=1e-6)
    converted, arrays, _ = flora.to_lora(params, adapters, plan, rank=4)
    same(flora.materialize(flora.bind(params, arrays, converted)), merged)


def test_untrained_adapters_are_zero():
    params = stacked_params()
    plan = flora.plan(
        params, {"layers/q_proj/kernel": flora.Hydra(), "layers/up/kernel": flora.DoRA(rank=2)}
    )
    adapters = flora.init(plan, jax.random.key(0), params)
    _, arrays, report = flora.to_lora(params, adapters, plan, energy=0.9)
    assert report["layers/q_proj/kernel"].rank == 1
    assert (
        float(
            jnp.abs(arrays["layers/q_proj/kernel"]["a"] @ arrays["layers/q_proj/kernel"]["b"]).max()
        )
        == 0
    )


@pytest.mark.parametrize("randomized", [True, False])
def test_dense_changes_meet_their_target(randomized):
    u, v = jnp.linalg.qr(r(60, 60))[0], jnp.linalg.qr(r(70, 70))[0]
    matrix = (u * 0.7 ** jnp.arange(60)) @ v[:, :60].T
    for error in (0.2, 1e-3):
        kept = from_matrix(matrix, Target(error=error, randomized=randomized), "w")
        s = 0.7 ** np.arange(60)
        best = int(np.argmax(np.cumsum(s**2) >= (1 - error**2) * (s**2).sum())) + 1
        assert best <= kept.rank <= best + 1
        true = jnp.linalg.norm(matrix - kept.a @ kept.b) / jnp.linalg.norm(matrix)
        assert true <= error * 1.001
        np.testing.assert_allclose(kept.error, true, rtol=1e-2)


def test_limits_say_what_is_wrong():
    with pytest.raises(ConfigError, match=r"energy=1.5 is outside"):
        Target(energy=1.5)
    with pytest.raises(ConfigError, match="give one of them"):
        Target(energy=0.5, error=0.5)
    with pytest.raises(ConfigError, match="rank=0"):
        Target(rank=0)


def tuned_pair():
    base = stacked_params()
    plan, adapters = trained(base, {"layers/(q_proj|up)/kernel": flora.LoRA(rank=2)})
    return base, flora.materialize(flora.bind(base, adapters, plan))


def test_extraction_finds_the_lora_that_was_merged():
    base, tuned = tuned_pair()
    plan, arrays, report = flora.extract_lora(base, tuned, "layers/.*/kernel", error=1e-3)
    assert [row.rank for row in report] == [2, 2]
    same(flora.materialize(flora.bind(base, arrays, plan)), tuned, atol=1e-3)
    plan, arrays, report = flora.extract_lora(
        base, tuned, {".*/up/kernel": 1, ".*/kernel": None}, rank=2, randomized=True
    )
    assert [(row.path, row.rank) for row in report] == [
        ("layers/q_proj/kernel", 2),
        ("layers/up/kernel", 1),
    ]
    assert (
        0.01 < report["layers/up/kernel"].error < 1 and report["layers/q_proj/kernel"].error < 1e-3
    )


def test_extraction_from_a_low_bit_base_mends_the_rounding():
    base, tuned = tuned_pair()
    low = flora.quantize(base, {"layers/.*/kernel": flora.Format("int4", block=4)})
    plan, arrays, _ = flora.extract_lora(low, tuned, [".*/kernel"], rank=8)
    merged = flora.materialize(flora.bind(low, arrays, plan), quantized="dequantize")
    same(merged, tuned, atol=1e-4)


def test_what_no_rule_has():
    base, tuned = tuned_pair()
    tuned["layers"]["norm"]["scale"] = tuned["layers"]["norm"]["scale"] + 1
    rules = [".*/q_proj/kernel"]
    with pytest.raises(
        StructureError, match=r"2 leaves differ .*layers/norm/scale, layers/up/kernel"
    ):
        flora.extract_lora(base, tuned, rules, rank=2)
    plan, arrays, report = flora.extract_lora(base, tuned, rules, rank=2, others="replace")
    assert [row.form for row in report] == ["replace", "lora", "replace"]
    same(flora.materialize(flora.bind(base, arrays, plan)), tuned, atol=1e-4)
    plan, _, _ = flora.extract_lora(base, tuned, rules, rank=2, others="ignore")
    assert [entry.path for entry in plan] == ["layers/q_proj/kernel"]


def test_extraction_refuses():
    base, tuned = tuned_pair()
    with pytest.raises(RuleError, match="matches nothing"):
        flora.extract_lora(base, tuned, [".*/qproj/kernel"], rank=2)
    with pytest.raises(PlanError, match="norm/scale: a vector leaf has no LoRA"):
        flora.extract_lora(base, tuned, [".*/norm/scale"], rank=2)
    with pytest.raises(PlanError, match="nothing differs"):
        flora.extract_lora(base, base, [".*/kernel"], rank=2)
    with pytest.raises(PlanError, match="q_proj/kernel: give rank="):
        flora.extract_lora(base, tuned, [".*/kernel"])
    with pytest.raises(StructureError, match="embed/embedding is in the base only"):
        flora.extract_lora(base, {"layers": tuned["layers"]}, [".*/kernel"], rank=2)
    with pytest.raises(ConfigError, match="nearest: replace"):
        flora.extract_lora(base, tuned, [".*/kernel"], rank=2, others="replac")
