"""The contracts of every weight adapter on every kind of kernel (C1-C7 of the method cards)."""

from __future__ import annotations

import dataclasses
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    ADAPTERS,
    LAYERS,
    NEEDS_STACK,
    PAIRS,
    REFUSED,
    bind,
    fresh,
    layer_of,
    make_plan,
    merged_rows,
    perturbed,
    run,
)

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import PlanError
from flora_jax.core.spec import KernelSpec

# Methods whose arrays stand in the weight's place.
REPLACING = [
    n for n, (a, _) in ADAPTERS.items() if type(a).value is not Adapter.value
]
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}


def close(a, b, tolerance):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def test_every_registered_adapter_has_a_case():
    cases = {type(adapter) for adapter, _ in ADAPTERS.values()} | harness.IN_MODELS
    assert {m.cls for m in flora.methods("adapter")} <= cases


@pytest.mark.parametrize("pair", sorted(REFUSED), ids="-".join)
def test_refused_combinations_say_so(pair):
    layer = layer_of(*pair)
    with pytest.raises(PlanError, match=layer.name):
        make_plan(layer, ADAPTERS[pair[0]][0], harness.base_params(layer))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_identity_lazy_dense_and_gradients(name, kind):
    """C1 identity, C2 merge, C3 gradients, C5 jit: one trace each."""
    layer, adapter = layer_of(name, kind), ADAPTERS[name][0]
    params, x = harness.base_params(layer), layer.x()
    plan = make_plan(layer, adapter, params)
    adapters = fresh(plan, params)

    @jax.jit
    def everything(params, adapters, x):
        loss = lambda a: jnp.sum(jnp.square(run(layer, bind(params, a, plan, x), x)))
        bound = bind(params, adapters, plan, x)
        merged = params
        if harness.merges(name):
            _, merged = next(merged_rows(params, adapters, plan, x))
        grads = jax.grad(loss)(adapters)
        other = harness.expected(name, layer, params, adapters, plan, x)
        return run(layer, bound, x), merged, other, grads

    before = run(layer, params, x)
    start = everything(params, adapters, x)[0]
    if name in harness.NOT_IDENTITY:
        change = np.linalg.norm(start - before) / np.linalg.norm(before)
        assert 0 < change < harness.NOT_IDENTITY[name]
    else:
        close(start, before, 2e-5)

    moved = perturbed(plan, adapters)
    lazy, merged, dense, grads = everything(params, moved, x)
    assert everything._cache_size() == 1, "a new set of values must not recompile"
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    close(lazy, dense, 2e-5)
    if not harness.merges(name):
        with pytest.raises(PlanError, match=f"^{layer.name}: .* does not merge"):
            flora.materialize(bind(params, moved, plan, x))
    assert np.abs(lazy - before).max() > 1e-3, "the adapter does nothing"

    train, frozen = flora.partition(grads, plan)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(frozen))
    for path, arrays in train.items():
        for array_name, g in arrays.items():
            assert np.isfinite(g).all()
            none = re.fullmatch(harness.NO_GRADIENT.get(name, ""), array_name)
            assert none or np.abs(g).max() > 0, f"{path}/{array_name} gets no gradient"


@pytest.mark.parametrize("name", ADAPTERS)
def test_count_and_json(name):
    """C4 the parameter formula, C7 the plan as JSON, hash and equality."""
    adapter, count = ADAPTERS[name]
    layer = layer_of(name, "dense")
    plan = make_plan(layer, adapter, harness.base_params(layer))
    assert plan.count == count
    again = flora.Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.fingerprint() == plan.fingerprint()


@pytest.mark.parametrize(
    ("name", "kind"), [p for p in PAIRS if p[1] in ("dense", "einsum-out", "conv", "embedding")]
)
def test_bfloat16_base_float32_adapter(name, kind):
    """C6: a bf16 base and activations with float32 adapters; the output stays bf16."""
    layer, adapter = layer_of(name, kind), ADAPTERS[name][0]
    params = harness.base_params(layer, jnp.bfloat16)
    x = layer.x()
    x = x if kind == "embedding" else x.astype(jnp.bfloat16)
    plan = make_plan(layer, adapter, params)
    adapters = perturbed(plan, fresh(plan, params))
    lazy = run(layer, bind(params, adapters, plan, x), x)
    assert lazy.dtype == jnp.bfloat16

    if harness.merges(name):
        _, merged = next(merged_rows(params, adapters, plan, x))
        assert merged[layer.name].dtype == jnp.bfloat16 or name == "Replace"
    close(lazy, harness.expected(name, layer, params, adapters, plan, x), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("fmt", [flora.Format("int8"), flora.Format("int4", block=4)], ids=str)
@pytest.mark.parametrize("name", [n for n in ADAPTERS if n not in REPLACING])
def test_quantised_base(name, fmt):
    """The adapter on a low-bit base equals the adapter on the dequantised base; merging asks."""
    layer, adapter = LAYERS["dense"], ADAPTERS[name][0]
    params = harness.base_params(layer)
    low = flora.quantize(params, {layer.name: fmt})
    plain = flora.dequantize(low)
    plan = make_plan(layer, adapter, low)
    adapters = perturbed(plan, fresh(plan, low))
    x = layer.x()
    bound = bind(low, adapters, plan, x)
    close(run(layer, bound, x), run(layer, bind(plain, adapters, plan, x), x), 2e-5)
    bound = bind(low, adapters, plan, x[:1])
    with pytest.raises(PlanError, match="low-bit base"):
        flora.materialize(bound)
    if not harness.merges(name):
        with pytest.raises(PlanError, match="does not merge"):
            flora.materialize(bound, quantized="dequantize")
        return
    merged = flora.materialize(bound, quantized="dequantize")
    close(run(layer, merged, x), run(layer, bound, x), 2e-5)
    rounded, report = flora.requantize(bound, original=params)
    again, row = rounded[layer.name], report[layer.name]
    assert again.fmt == fmt and [r.path for r in report] == [layer.name]
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
    lost = norm(again.dense() - merged[layer.name])
    change = norm(merged[layer.name] - plain[layer.name])
    np.testing.assert_allclose(row.error, lost / norm(merged[layer.name]), rtol=1e-3)
    np.testing.assert_allclose(row.of_change, lost / change, rtol=1e-3)
    base = norm(plain[layer.name] - params[layer.name]) / norm(params[layer.name])
    np.testing.assert_allclose(row.base, base, rtol=1e-3)
    step = np.asarray(again.scale).max()
    assert np.abs(again.dense() - merged[layer.name]).max() <= 0.5 * step + 1e-6


@pytest.mark.parametrize("name", REPLACING)
def test_a_replaced_weight_starts_from_the_dequantised_base(name):
    """Methods whose arrays stand in the weight's place read a low-bit base, then leave it."""
    adapter = ADAPTERS[name][0]
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(3), (2, 12, 8))}}
    low = flora.quantize(params, {".*": flora.Format("int8")})
    plan = flora.plan(low, {".*": adapter})
    kernels, trees = [], {}
    for base in (low, flora.dequantize(low)):
        trees["one"] = fresh(plan, base)
        trees["two"] = perturbed(plan, trees["one"])
        alone = flora.materialize(flora.bind(base, trees["one"], plan))
        both = flora.materialize(flora.bind(base, trees, plan, weights={"one": 1.0, "two": 0.5}))
        kernels.append([alone["layers"]["kernel"], both["layers"]["kernel"]])
    close(kernels[0][0], flora.dequantize(low)["layers"]["kernel"], 2e-5)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), *kernels)


@pytest.mark.parametrize("name", sorted(NEEDS_STACK))
def test_a_method_of_the_stack_refuses_an_unrolled_model(name):
    layer = LAYERS["dense"]
    with pytest.raises(PlanError, match=f"^{layer.name}: .*scan_layers"):
        make_plan(layer, ADAPTERS[name][0], harness.base_params(layer))


@pytest.mark.parametrize("name", ADAPTERS)
def test_stack_equals_loop_and_scan(name):
    """vmapped init and merge == a loop over the unrolled model; lazily inside lax.scan."""
    adapter = ADAPTERS[name][0]
    square = jax.random.normal(jax.random.key(5), (3, 8, 8)) / 3
    stacked = {"layers": {"kernel": square}}
    unrolled = {f"layers_{i}": {"kernel": square[i]} for i in range(3)}
    plan = flora.plan(stacked, {"layers/kernel": adapter})
    if name in NEEDS_STACK:
        moved = perturbed(plan, fresh(plan, stacked))
        _scan_equals_merge(name, stacked, moved, plan)
        return
    plans = flora.plan(unrolled, {"layers/kernel": adapter})
    assert plan.count == plans.count
    adapters = fresh(plan, stacked)
    loop = fresh(plans, unrolled)
    pools = [pool.path for pool in plan.pools]
    assert pools == [pool.path for pool in plans.pools]
    for i in range(3):
        mine = jax.tree.map(lambda a, i=i: a[i], adapters["layers/kernel"])
        jax.tree.map(lambda a, b: close(a, b, 1e-5), mine, loop[f"layers_{i}/kernel"])
    jax.tree.map(
        lambda a, b: close(a, b, 1e-5), *({p: t[p] for p in pools} for t in (adapters, loop))
    )
    moved = perturbed(plan, adapters)
    loop = {
        f"layers_{i}/kernel": jax.tree.map(lambda a, i=i: a[i], moved["layers/kernel"])
        for i in range(3)
    } | {path: moved[path] for path in pools}
    scanned, x = _scan_equals_merge(name, stacked, moved, plan)
    one_by_one = x
    tree = bind(unrolled, loop, plans, x)
    for i in range(3):
        one_by_one = jnp.tanh(ops.dot(one_by_one, tree[f"layers_{i}"]["kernel"]))
    close(scanned, one_by_one, 2e-5)


def _scan_equals_merge(name, stacked, adapters, plan):
    x = jax.random.normal(jax.random.key(6), (2, 8))
    bound = bind(stacked, adapters, plan, x)

    def body(x, layer):
        return jnp.tanh(ops.dot(x, layer["kernel"])), None

    scanned, _ = jax.lax.scan(jax.checkpoint(body), x, bound["layers"])
    if not harness.merges(name):
        with pytest.raises(PlanError, match="^layers/kernel: .* does not merge"):
            flora.materialize(bound)
        return scanned, x
    for rows, merged in merged_rows(stacked, adapters, plan, x):
        by_merge = x[rows]
        for kernel in merged["layers"]["kernel"]:
            by_merge = jnp.tanh(by_merge @ kernel)
        close(scanned[rows], by_merge, 2e-5)
    return scanned, x


@pytest.mark.parametrize("name", ADAPTERS)
def test_two_named_adapters_add_their_changes(name):
    """bind({name: tree}, weights) = W0 + sum_i w_i (W_i - W0), for any method."""
    layer, adapter = layer_of(name, "dense"), ADAPTERS[name][0]
    params, x = harness.base_params(layer), layer.x()
    plan = make_plan(layer, adapter, params)
    lora = make_plan(layer, flora.LoRA(rank=2), params)
    one = perturbed(plan, fresh(plan, params))
    two = perturbed(lora, fresh(lora, params, 1))
    plans, trees = {"one": plan, "two": lora}, {"one": one, "two": two}
    weights = {"one": 0.5, "two": -2.0}
    both = bind(params, trees, plans, x, weights=weights)
    plain = run(layer, params, x)
    changes = [
        run(layer, bind(params, a, p, x), x) - plain for a, p in ((one, plan), (two, lora))
    ]
    close(run(layer, both, x), plain + 0.5 * changes[0] - 2.0 * changes[1], 5e-5)
    if not harness.merges(name):
        with pytest.raises(PlanError, match="does not merge"):
            flora.materialize(both)
        return
    x = x[:1]  # one row's weights merge, whatever the method
    merge = lambda a, p, **options: next(merged_rows(params, a, p, x, **options))[1]
    delta = lambda a, p: jax.tree.map(jnp.subtract, merge(a, p), params)
    expected = jax.tree.map(
        lambda w, d1, d2: w + 0.5 * d1 - 2.0 * d2, params, delta(one, plan), delta(two, lora)
    )
    merged = merge(trees, plans, weights=weights)
    jax.tree.map(lambda a, b: close(a, b, 5e-5), merged, expected)


ROW_KINDS = ("dense", "einsum-out", "conv", "embedding", "tied-head")


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[1] in ROW_KINDS])
def test_rows_choose_among_adapters(name, kind):
    """bind(rows=...) == each row alone under its adapter: two of a method, a LoRA, the base."""
    layer, adapter = layer_of(name, kind), ADAPTERS[name][0]
    params, x = harness.base_params(layer), layer.x()
    x = jnp.concatenate([x, 0 * x, x])[:5] if kind != "embedding" else jnp.tile(x, (3, 1))[:5]
    plan = make_plan(layer, adapter, params)
    lora = make_plan(layer, flora.LoRA(rank=2), params)
    one = perturbed(plan, fresh(plan, params))
    two = perturbed(plan, one)
    three = perturbed(lora, fresh(lora, params, 1))
    plans = {"one": plan, "two": plan, "three": lora}
    trees = {"one": one, "two": two, "three": three}

    @jax.jit
    def mixed(rows, x):
        return run(layer, bind(params, trees, plans, x, rows=rows), x)

    for rows in ([0, 1, 2, -1, 1], [2, -1, -1, 0, 0]):
        y = mixed(jnp.array(rows), x)
        for n, row in enumerate(rows):
            key = list(plans)[row] if row >= 0 else None
            tree = params if key is None else bind(params, trees[key], plans[key], x)
            close(y[n : n + 1], run(layer, tree, x)[n : n + 1], 5e-5)
    assert mixed._cache_size() == 1, "other rows must not recompile"
    with pytest.raises(PlanError, match="one merged weight"):
        flora.materialize(bind(params, trees, plans, x, rows=jnp.zeros(5, int)))


# A shared rotation has no blocks of its own to drop.
NO_DROPOUT = {"OFT-shared"}
# Dropout inside a map that is not linear in the branch, or that is not rescaled.
NOT_ON_AVERAGE = ("DoRA", "Hydra-seq", "OFT")


@pytest.mark.parametrize(
    "name", [n for n, (a, _) in ADAPTERS.items() if hasattr(a, "dropout") and n not in NO_DROPOUT]
)
def test_dropout_touches_the_branch_only_while_training(name):
    layer = LAYERS["dense"]
    adapter = dataclasses.replace(ADAPTERS[name][0], dropout=0.5)
    params, x = harness.base_params(layer), layer.x()
    plan = make_plan(layer, adapter, params)
    moved = perturbed(plan, fresh(plan, params))
    key = jax.random.key(1)
    plain = run(layer, bind(params, moved, plan, x), x)
    asleep = run(layer, bind(params, moved, plan, x, rng=key, train=False), x)
    np.testing.assert_array_equal(plain, asleep)
    awake = run(layer, bind(params, moved, plan, x, rng=key, train=True), x)
    again = run(layer, bind(params, moved, plan, x, rng=key, train=True), x)
    np.testing.assert_array_equal(awake, again)
    assert np.abs(awake - plain).max() > 1e-3
    f = jax.jit(
        jax.vmap(lambda k: run(layer, flora.bind(params, moved, plan, rng=k, train=True), x))
    )
    samples = np.asarray(f(jax.random.split(key, 4000)))
    error = 5 * samples.std(0).max() / np.sqrt(4000)
    if not name.startswith(NOT_ON_AVERAGE):
        assert np.abs(samples.mean(0) - plain).max() < error


def test_a_weight_used_as_another_kind_is_an_error():
    kernel = jnp.ones((4, 2, 3))
    plan = flora.plan(
        {"kernel": kernel}, {"kernel": flora.LoRA(rank=1)}, specs={"kernel": KernelSpec.dense(1, 2)}
    )
    bound = flora.bind(
        {"kernel": kernel}, flora.init(plan, jax.random.key(0), {"kernel": kernel}), plan
    )
    with pytest.raises(PlanError, match="specs="):
        ops.dot(jnp.ones((5, 4, 2)), bound["kernel"], in_axes=2)
    with pytest.raises(TypeError, match="intercept"):
        jnp.ones((5, 4)) @ bound["kernel"]
