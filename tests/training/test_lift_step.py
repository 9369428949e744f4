"""LIFT in the training step: one program, Replace leaves of scanned layers, meshes, deltas."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import simulated
from training_fixtures import Stream, language_model

import flora_jax as flora
from flora_jax import io, training
from flora_jax.core.errors import PlanError

KERNELS = "layers/(up|down)_proj/kernel"
RULES = {KERNELS: flora.Replace(), "embed_tokens/embedding": flora.Replace()}
LIFT = training.LIFT(learning_rate=1e-2, rank=2, filter_rank=4, refresh=3)
OPTIMIZER = training.Groups(rules={f"{KERNELS}/value": LIFT, ".*": training.AdamW()})


def trained(optimizer=OPTIMIZER, rules=RULES, steps=7):
    loss, base, plan, adapters = language_model(rules)
    state = training.create_state(plan, adapters, optimizer)
    step = training.make_step(loss, plan, optimizer)
    for batch, _ in zip(Stream(), range(steps), strict=False):
        state, metrics = step(state, base, batch)
    return base, plan, state, step, metrics


def test_one_program_through_every_refresh():
    _, _, state, step, metrics = trained()
    assert step._cache_size() == 1 and metrics["ok"]
    assert {k: float(v) for k, v in metrics.items() if k.startswith("lr")} == {
        f"lr/{KERNELS}/value": pytest.approx(1e-2),
        "lr/.*": pytest.approx(1e-3),
    }
    assert int(state.step) == 7


def test_the_result_of_a_run_is_a_few_numbers(tmp_path):
    """Without a refresh exactly k entries of each layer change; the delta gives the run back."""
    lift = training.LIFT(learning_rate=1e-2, rank=2, filter_rank=4)
    rules = {KERNELS: flora.Replace()}
    base, plan, state, *_ = trained(lift, rules)
    after = flora.materialize(flora.bind(base, state.adapters, plan))
    delta = io.sparse_delta(base, after)
    k = 2 * (16 + 32)
    assert {path: len(e.indices) for path, e in delta.items()} == {
        "layers/down_proj/kernel": 2 * k,
        "layers/up_proj/kernel": 2 * k,
    }
    moved = training.moves(lift, state.train)
    assert moved == {f"{path}/value": 2 * k for path in delta}
    masks = state.opt_state.inner_state.index["layers/up_proj/kernel"]["value"]
    flat = (np.arange(2)[:, None] * 16 * 32 + np.asarray(masks)).reshape(-1)
    np.testing.assert_array_equal(delta["layers/up_proj/kernel"].indices, flat)
    io.save_delta(tmp_path / "delta.safetensors", base, delta)
    again = io.apply_delta(base, io.load_delta(tmp_path / "delta.safetensors", base))
    jax.tree.map(np.testing.assert_array_equal, again, after)


def test_groups_count_what_each_moves():
    *_, state, _, _ = trained(steps=1)
    assert training.moves(OPTIMIZER, state.train) == {
        "embed_tokens/embedding/value": 64 * 16,
        "layers/down_proj/kernel/value": 2 * 96,
        "layers/up_proj/kernel/value": 2 * 96,
    }
    still = training.Groups(rules={".*/kernel/.*": LIFT, ".*": None})
    assert training.moves(still, state.train)["embed_tokens/embedding/value"] == 0


def test_a_norm_in_its_group_is_named():
    with pytest.raises(PlanError, match="layers/up_proj/kernel/m: LIFT masks matrices"):
        trained(LIFT, {"layers/up_proj/kernel": flora.DoRA(rank=4)}, steps=1)


def test_bfloat16_weights_keep_their_bits_too():
    loss, base, _, _ = language_model(RULES, dtype=jnp.bfloat16)
    base = training.cast_base(base, jnp.bfloat16)
    plan = flora.plan(base, {KERNELS: flora.Replace()})
    lift = training.LIFT(learning_rate=1e-1, rank=2, filter_rank=4)
    state = training.create_state(plan, flora.init(plan, jax.random.key(0), base), lift)
    step = training.make_step(loss, plan, lift)
    for batch, _ in zip(Stream(), range(3), strict=False):
        state, _ = step(state, base, batch)
    assert {x.dtype for x in jax.tree.leaves(state.train)} == {jnp.dtype("bfloat16")}
    delta = io.sparse_delta(base, flora.materialize(flora.bind(base, state.adapters, plan)))
    assert all(0 < len(e.indices) <= 2 * 96 for e in delta.values())


MESH = """
import jax, numpy as np
from test_lift_step import OPTIMIZER, RULES, Stream, flora, language_model, training
loss, base, plan, adapters = language_model(RULES)
states = []
for mesh in (None, training.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
    state = training.create_state(plan, adapters, OPTIMIZER)
    layout, params, put = None, base, lambda x: x
    if mesh is not None:
        specs = training.base_specs(base, mesh)
        layout = training.state_shardings(state, plan, specs, mesh)
        state = jax.device_put(state, layout)
        params = jax.device_put(base, training.base_shardings(base, mesh))
        put = lambda x: jax.device_put(x, training.batch_sharding(mesh))
    step = training.make_step(loss, plan, OPTIMIZER, shardings=layout, donate=False)
    for batch, _ in zip(Stream(), range(5), strict=False):
        state, metrics = step(state, params, put(batch))
    states.append(jax.device_get((state.train, state.opt_state)))
value = state.train["layers/up_proj/kernel"]["value"]
print("devices", jax.device_count(), tuple(value.sharding.spec))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
jax.tree.map(close, *states)
print("same")
"""


def test_eight_devices_train_the_same_entries():
    environment = simulated(8, os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", MESH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "devices 8 (None, 'fsdp', 'tensor')" in done.stdout and "same" in done.stdout
