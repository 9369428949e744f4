"""The step: accumulation, clipping, non-finite gradients, compilation count, dropout keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import RULES, Stream, TinyLM, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.core import paths
from flora_jax.core.errors import ConfigError

PLAIN = {"layers/(up|down)_proj/kernel": flora.LoRA(rank=4, alpha=8.0)}
OPTIMIZER = training.AdamW(learning_rate=1e-2)


def trained(rules=PLAIN, steps=3, optimizer=OPTIMIZER, **kw):
    loss, base, plan, adapters = language_model(rules)
    state = training.create_state(plan, adapters, optimizer, 0)
    step = training.make_step(loss, plan, optimizer, **kw)
    data, metrics = Stream(), []
    for _ in range(steps):
        state, m = step(state, base, next(data))
        metrics.append(m)
    return state, metrics, step


def assert_close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def test_accumulation_equals_the_large_batch():
    one, m1, _ = trained(optimizer=training.SGD(learning_rate=0.5))
    four, m4, _ = trained(accumulate=4, optimizer=training.SGD(learning_rate=0.5))
    assert_close(one.train, four.train, rtol=1e-5, atol=1e-6)
    for a, b in zip(m1, m4, strict=True):
        for name in ("loss", "weight", "nll", "accuracy", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_accumulation_must_divide():
    with pytest.raises(ConfigError, match="accumulate=3 does not divide 'loss_mask' of 8 rows"):
        trained(accumulate=3, steps=1)
    with pytest.raises(ConfigError, match="accumulate=0"):
        trained(accumulate=0)


def test_gradient_is_that_of_the_masked_mean():
    loss, base, plan, adapters = language_model(PLAIN)
    batch = next(Stream())

    def mean(train):
        model = TinyLM()
        logits, _ = model.apply({"params": flora.bind(base, train, plan)}, batch["tokens"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    value, grads = jax.value_and_grad(mean)(adapters)
    state = training.create_state(plan, adapters, training.SGD(learning_rate=1.0))
    step = training.make_step(loss, plan, training.SGD(learning_rate=1.0), donate=False)
    new, metrics = step(state, base, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert_close(new.train, jax.tree.map(lambda p, g: p - g, adapters, grads), atol=1e-6)


def test_clip_bounds_the_update():
    loss, base, plan, adapters = language_model(PLAIN)
    sgd = training.SGD(learning_rate=1.0)
    state = training.create_state(plan, adapters, sgd)
    step = training.make_step(loss, plan, sgd, clip=1e-3, donate=False)
    new, metrics = step(state, base, next(Stream()))
    change = optax.tree.norm(jax.tree.map(jnp.subtract, new.train, state.train))
    assert metrics["grad_norm"] > 1e-3
    np.testing.assert_allclose(change, 1e-3, rtol=1e-3)


def test_training_learns_and_compiles_once():
    state, metrics, step = trained(steps=40)
    assert float(metrics[-1]["loss"]) < 0.8 * float(metrics[0]["loss"])
    assert int(state.step) == 40
    assert step._cache_size() == 1


def test_swapping_adapters_does_not_recompile():
    loss, base, plan, adapters = language_model(PLAIN)
    step = training.make_step(loss, plan, OPTIMIZER)
    losses = []
    for seed in range(3):
        adapters = flora.init(plan, jax.random.key(seed), base)
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        state = training.create_state(plan, adapters, OPTIMIZER)
        losses.append(float(step(state, base, next(Stream()))[1]["loss"]))
    assert len(set(losses)) == 3
    assert step._cache_size() == 1


def test_nonfinite_gradient_leaves_the_state_and_names_the_path():
    loss, base, plan, adapters = language_model(PLAIN)
    state = training.create_state(plan, adapters, OPTIMIZER)

    def poisoned(bound, batch, rng, train):
        total, weight, aux = loss(bound, batch, rng, train)
        leaf = bound["layers"]["up_proj"]["kernel"].bound[0].params["b"]
        return total + 0.0 * jnp.sum(jnp.sqrt(leaf)), weight, aux  # sqrt'(0) = inf, 0 * inf = nan

    step = training.make_step(poisoned, plan, OPTIMIZER, donate=False)
    new, metrics = step(state, base, next(Stream()))
    assert not metrics["ok"]
    assert training.bad_paths(metrics) == ["layers/up_proj/kernel/b"]
    plain = lambda s: dataclasses.replace(s, rng=jax.random.key_data(s.rng))  # noqa: E731
    assert_close(plain(new), plain(state), rtol=0)
    assert int(new.step) == 0


def test_fully_masked_batch_is_a_finite_no_op():
    loss, base, plan, adapters = language_model(PLAIN)
    state = training.create_state(plan, adapters, OPTIMIZER)
    batch = next(Stream())
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    step = training.make_step(loss, plan, OPTIMIZER, donate=False)
    new, metrics = step(state, base, batch)
    assert metrics["ok"] and metrics["loss"] == 0 and metrics["weight"] == 0
    assert_close(new.train, state.train, rtol=0)


def test_dropout_follows_the_step_number():
    loss, base, plan, adapters = language_model(RULES)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    state = training.create_state(plan, adapters, OPTIMIZER, 3)
    step = training.make_step(loss, plan, OPTIMIZER, donate=False)
    batch = next(Stream())
    first = step(state, base, batch)[1]["loss"]
    again = step(state, base, batch)[1]["loss"]
    later = step(dataclasses.replace(state, step=state.step + 1), base, batch)[1]["loss"]
    assert first == again != later


def test_base_is_untouched_and_state_is_donated():
    loss, base, plan, adapters = language_model(PLAIN)
    before = jax.tree.map(np.array, base)
    state = training.create_state(plan, adapters, OPTIMIZER)
    step = training.make_step(loss, plan, OPTIMIZER)
    new, _ = step(state, base, next(Stream()))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.train))
    assert_close(base, before, rtol=0)
    assert not any("embed" in path for path in paths.flatten(new.opt_state))


def test_mixed_precision_keeps_adapters_in_float32():
    loss, base, plan, adapters = language_model(PLAIN, dtype=jnp.bfloat16)
    base16 = training.cast_base(base, jnp.bfloat16)
    plan16 = flora.plan(base16, PLAIN)
    state = training.create_state(plan16, adapters, OPTIMIZER)
    step = training.make_step(loss, plan16, OPTIMIZER)
    losses = []
    for batch, _ in zip(Stream(), range(3), strict=False):
        state, metrics = step(state, base16, batch)
        losses.append(float(metrics["loss"]))
    assert {x.dtype for x in jax.tree.leaves(state.train)} == {jnp.dtype("float32")}
    wide = [float(m["loss"]) for m in trained()[1]]
    np.testing.assert_allclose(losses, wide, rtol=0.02)


def test_evaluator_weighs_batches_by_their_sums():
    loss, base, plan, adapters = language_model(PLAIN)
    state = training.create_state(plan, adapters, OPTIMIZER)
    batches = [batch for batch, _ in zip(Stream(), range(3), strict=False)]
    got = training.make_evaluator(loss, plan)(state, base, batches)
    whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    total, weight, aux = loss(flora.bind(base, adapters, plan), whole, None, False)
    np.testing.assert_allclose(got["loss"], total / weight, rtol=1e-5)
    np.testing.assert_allclose(got["accuracy"], aux["accuracy"] / weight, rtol=1e-5)
