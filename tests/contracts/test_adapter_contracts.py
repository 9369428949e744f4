"""The contracts of every weight adapter on every kind of kernel (C1-C7 of the method cards)."""

from __future__ import annotations

import dataclasses
import functools
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
    case,
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
REPLACING = [n for n, (a, _) in ADAPTERS.items() if type(a).value is not Adapter.value]
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


@functools.cache
def plain_output(kind, stacked):
    """What the layer alone makes of its input."""
    layer = layer_of(sorted(NEEDS_STACK)[0], kind) if stacked else LAYERS[kind]
    return np.asarray(run(layer, harness.base_params(layer), layer.x()))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_identity_lazy_dense_and_gradients(name, kind):
    """C1 identity, C2 merge, C3 gradients, C5 jit: one trace each."""
    one = case(name, kind)
    layer, params, x, plan = one.layer, one.params, one.x, one.plan

    @jax.jit
    def everything(params, adapters, x):
        loss = lambda a: jnp.sum(jnp.square(run(layer, bind(params, a, plan, x), x)))
        lazy = run(layer, bind(params, adapters, plan, x), x)
        merged, dense = harness.expected(name, layer, params, adapters, plan, x)
        return lazy, merged, dense, jax.grad(loss)(adapters)

    before = plain_output(kind, name in NEEDS_STACK)
    start = jax.device_get(everything(params, one.start, x)[0])
    if name in harness.NOT_IDENTITY:
        change = np.linalg.norm(start - before) / np.linalg.norm(before)
        assert 0 < change < harness.NOT_IDENTITY[name]
    else:
        close(start, before, 2e-5)

    lazy, merged, dense, grads = jax.device_get(everything(params, one.moved, x))
    assert everything._cache_size() == 1, "a new set of values must not recompile"
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    close(lazy, dense, 2e-5)
    if not harness.merges(name):
        with pytest.raises(PlanError, match=f"^{layer.name}: .* does not merge"):
            flora.materialize(bind(params, one.moved, plan, x))
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

    @jax.jit
    def both(params, adapters, x):
        lazy = run(layer, bind(params, adapters, plan, x), x)
        return lazy, *harness.expected(name, layer, params, adapters, plan, x)

    lazy, merged, dense = both(params, adapters, x)
    assert lazy.dtype == jnp.bfloat16
    assert merged[layer.name].dtype == jnp.bfloat16 or name == "Replace"
    close(lazy, dense, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("fmt", [flora.Format("int8"), flora.Format("int4", block=4)], ids=str)
@pytest.mark.parametrize("name", [n for n in ADAPTERS if n not in REPLACING])
def test_quantised_base(name, fmt):
    """The adapter on a low-bit base equals the adapter on the dequantised base; merging asks."""
    layer, adapter = LAYERS["dense"], ADAPTERS[name][0]
    params, x = harness.base_params(layer), layer.x()
    low = flora.quantize(params, {layer.name: fmt})
    plain = flora.dequantize(low)
    plan = make_plan(layer, adapter, low)
    adapters = perturbed(plan, fresh(plan, low))

    @jax.jit
    def outputs(low, plain, adapters, x):
        both = [run(layer, bind(base, adapters, plan, x), x) for base in (low, plain)]
        return both, bind(low, adapters, plan, x[:1])

    both, bound = outputs(low, plain, adapters, x)
    close(*both, 2e-5)
    with pytest.raises(PlanError, match="low-bit base"):
        flora.materialize(bound)
    if not harness.merges(name):
        with pytest.raises(PlanError, match="does not merge"):
            flora.materialize(bound, quantized="dequantize")
        return

    @jax.jit
    def merge(bound, x):
        merged = flora.materialize(bound, quantized="dequantize")
        return merged, run(layer, merged, x), run(layer, bound, x)

    merged, after, before = merge(bound, x)
    close(after, before, 2e-5)
    rounded, report = flora.requantize(bound, original=params)
    again, row = rounded[layer.name], report[layer.name]
    assert again.fmt == fmt and [r.path for r in report] == [layer.name]
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
    dense, merged, plain, base = (
        np.asarray(a)
        for a in (again.dense(), merged[layer.name], plain[layer.name], params[layer.name])
    )
    lost, change = norm(dense - merged), norm(merged - plain)
    np.testing.assert_allclose(row.error, lost / norm(merged), rtol=1e-3)
    np.testing.assert_allclose(row.of_change, lost / change, rtol=1e-3)
    np.testing.assert_allclose(row.base, norm(plain - base) / norm(base), rtol=1e-3)
    step = np.asarray(again.scale).max()
    assert np.abs(dense - merged).max() <= 0.5 * step + 1e-6


@pytest.mark.parametrize("name", REPLACING)
def test_a_replaced_weight_starts_from_the_dequantised_base(name):
    """Methods whose arrays stand in the weight's place read a low-bit base, then leave it."""
    adapter = ADAPTERS[name][0]
    params = {"layers": {"kernel": harness.normal(3, 2, 12, 8)}}
    low = flora.quantize(params, {".*": flora.Format("int8")})
    plan = flora.plan(low, {".*": adapter})

    @jax.jit
    def merge(base, trees):
        alone = flora.materialize(flora.bind(base, trees["one"], plan))
        both = flora.materialize(flora.bind(base, trees, plan, weights={"one": 1.0, "two": 0.5}))
        return [alone["layers"]["kernel"], both["layers"]["kernel"]]

    kernels, trees = [], {}
    for base in (low, flora.dequantize(low)):
        # Not inside a program, where XLA may round the dequantised base otherwise.
        stats = harness.make_stats(plan)
        trees["one"] = flora.init(plan, jax.random.key(0), base, stats=stats)
        trees["two"] = perturbed(plan, trees["one"])
        kernels.append(merge(base, trees))
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
    square = harness.normal(5, 3, 8, 8) / 3
    stacked = {"layers": {"kernel": square}}
    unrolled = {f"layers_{i}": {"kernel": square[i]} for i in range(3)}
    plan = flora.plan(stacked, {"layers/kernel": adapter})
    adapters = fresh(plan, stacked)
    moved = perturbed(plan, adapters)
    scanned, x = _scan_equals_merge(name, stacked, moved, plan)
    if name in NEEDS_STACK:
        return
    plans = flora.plan(unrolled, {"layers/kernel": adapter})
    assert plan.count == plans.count
    loop = fresh(plans, unrolled)
    pools = [pool.path for pool in plan.pools]
    assert pools == [pool.path for pool in plans.pools]
    jax.tree.map(lambda a, b: close(a, b, 1e-5), _unrolled(adapters), dict(loop))

    @jax.jit
    def one_by_one(unrolled, loop, x):
        tree = bind(unrolled, loop, plans, x)
        for i in range(3):
            x = jnp.tanh(ops.dot(x, tree[f"layers_{i}"]["kernel"]))
        return x

    close(scanned, one_by_one(unrolled, _unrolled(moved), x), 2e-5)


def _unrolled(adapters):
    """The layers of a stack by name; what the layers share stays."""
    shared = {path: arrays for path, arrays in adapters.items() if path != "layers/kernel"}
    layers = jax.tree.map(np.asarray, adapters["layers/kernel"])
    return shared | {
        f"layers_{i}/kernel": jax.tree.map(lambda a, i=i: a[i], layers) for i in range(3)
    }


def _scan_equals_merge(name, stacked, adapters, plan):
    x = harness.normal(6, 2, 8)

    def body(x, layer):
        return jnp.tanh(ops.dot(x, layer["kernel"])), None

    @jax.jit
    def both(stacked, adapters, x):
        scanned, _ = jax.lax.scan(
            jax.checkpoint(body), x, bind(stacked, adapters, plan, x)["layers"]
        )
        if not harness.merges(name):
            return scanned, scanned
        by_merge = []
        for rows, merged in merged_rows(stacked, adapters, plan, x):
            y = x[rows]
            for kernel in merged["layers"]["kernel"]:
                y = jnp.tanh(y @ kernel)
            by_merge.append(y)
        return scanned, jnp.concatenate(by_merge)

    scanned, by_merge = both(stacked, adapters, x)
    close(scanned, by_merge, 2e-5)
    if not harness.merges(name):
        with pytest.raises(PlanError, match="^layers/kernel: .* does not merge"):
            flora.materialize(bind(stacked, adapters, plan, x))
    return scanned, x


@pytest.mark.parametrize("name", ADAPTERS)
def test_two_named_adapters_add_their_changes(name):
    """bind({name: tree}, weights) = W0 + sum_i w_i (W_i - W0), for any method."""
    one = case(name, "dense")
    two = harness.other("dense", name in NEEDS_STACK)
    layer, params, x = one.layer, one.params, one.x
    plans, trees = {"one": one.plan, "two": two.plan}, {"one": one.moved, "two": two.moved}
    weights = {"one": 0.5, "two": -2.0}

    @jax.jit
    def all_outputs(params, trees, x):
        both = bind(params, trees, plans, x, weights=weights)
        alone = [bind(params, trees[name], plans[name], x) for name in plans]
        return [run(layer, tree, x) for tree in (both, params, *alone)]

    both, plain, *alone = map(np.asarray, all_outputs(params, trees, x))
    close(both, plain + 0.5 * (alone[0] - plain) - 2.0 * (alone[1] - plain), 5e-5)
    if not harness.merges(name):
        with pytest.raises(PlanError, match="does not merge"):
            flora.materialize(bind(params, trees, plans, x, weights=weights))
        return

    @jax.jit
    def all_merged(params, trees, x):
        merge = lambda a, p, **options: next(merged_rows(params, a, p, x, **options))[1]
        alone = [merge(trees[name], plans[name]) for name in plans]
        return merge(trees, plans, weights=weights), *alone

    one_row = np.asarray(x)[:1]  # one row's weights merge, whatever the method
    merged, *alone = jax.device_get(all_merged(params, trees, one_row))
    expected = jax.tree.map(
        lambda w, w1, w2: w + 0.5 * (w1 - w) - 2.0 * (w2 - w), jax.device_get(params), *alone
    )
    jax.tree.map(lambda a, b: close(a, b, 5e-5), merged, expected)


ROW_KINDS = ("dense", "einsum-out", "conv", "embedding", "tied-head")


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[1] in ROW_KINDS])
def test_rows_choose_among_adapters(name, kind):
    """bind(rows=...) == each row alone under its adapter: two of a method, a LoRA, the base."""
    one, lora = case(name, kind), harness.other(kind, name in NEEDS_STACK)
    layer, params, plan = one.layer, one.params, one.plan
    x = np.asarray(one.x)
    x = np.concatenate([x, 0 * x, x])[:5] if kind != "embedding" else np.tile(x, (3, 1))[:5]
    # Rows count the names of the plans; the trees come out of jit in another order, the sorted one.
    plans = {"b": plan, "c": plan, "a": lora.plan}
    trees = {"a": lora.moved, "b": one.moved, "c": perturbed(plan, one.moved, 12)}

    @jax.jit
    def mixed(params, trees, rows, x):
        return run(layer, bind(params, trees, plans, x, rows=rows), x)

    @jax.jit
    def alone(params, trees, x):
        bound = [bind(params, trees[name], plans[name], x) for name in plans]
        return [run(layer, tree, x) for tree in (*bound, params)]  # rows of -1 have the base

    wanted = jax.device_get(alone(params, trees, x))
    for rows in ([0, 1, 2, -1, 1], [2, -1, -1, 0, 0]):
        y = np.asarray(mixed(params, trees, jnp.array(rows), x))
        for n, row in enumerate(rows):
            close(y[n : n + 1], wanted[row][n : n + 1], 5e-5)
    assert mixed._cache_size() == 1, "other rows must not recompile"
    bind_rows = lambda: bind(params, trees, plans, x, rows=jnp.zeros(5, int))
    with pytest.raises(PlanError, match="one merged weight"):
        jax.eval_shape(lambda: flora.materialize(bind_rows()))


# A shared rotation has no blocks of its own to drop.
NO_DROPOUT = {"OFT-shared"}
# Dropout inside a map that is not linear in the branch, or that is not rescaled.
NOT_ON_AVERAGE = ("DoRA", "Hydra-seq", "OFT")


@pytest.mark.parametrize(
    "name", [n for n, (a, _) in ADAPTERS.items() if hasattr(a, "dropout") and n not in NO_DROPOUT]
)
def test_dropout_touches_the_branch_only_while_training(name):
    one = harness.case_of(LAYERS["dense"], dataclasses.replace(ADAPTERS[name][0], dropout=0.5))
    layer, params, x, plan, moved = one.layer, one.params, one.x, one.plan, one.moved

    def output(key, **options):
        return run(layer, bind(params, moved, plan, x, rng=key, **options), x)

    outputs = jax.jit(lambda key: (output(None), output(key, train=False), output(key, train=True)))
    key = jax.random.key(1)
    plain, asleep, awake = jax.device_get(outputs(key))
    np.testing.assert_array_equal(plain, asleep)
    np.testing.assert_array_equal(awake, outputs(key)[2])
    assert np.abs(awake - plain).max() > 1e-3
    samples = jax.jit(jax.vmap(lambda k: output(k, train=True)))
    samples = np.asarray(samples(jax.random.split(key, 4000)))
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
