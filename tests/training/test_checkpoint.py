"""Checkpoints: round trip, refusals, what is kept; the base's fingerprint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import RULES, Stream, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.training import RunError

OPTIMIZER = training.lora_plus(training.AdamW(weight_decay=0.1), 4.0)


@pytest.fixture(scope="module")
def run():
    """State after one step, its identity and the base."""
    loss, base, plan, adapters = language_model()
    state = training.create_state(plan, adapters, OPTIMIZER, 5)
    step = training.make_step(loss, plan, OPTIMIZER)
    state, _ = step(state, base, next(Stream()))
    identity = training.Identity(
        plan=plan, base_fingerprint=training.fingerprint(base), base_source="seed 0"
    )
    return state, identity, base


def at(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def raw(state):
    return dataclasses.replace(state, rng=jax.random.key_data(state.rng))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, raw(a), raw(b))


def test_round_trip_with_loader(run, tmp_path):
    state, identity, _ = run
    stream = Stream()
    next(stream), next(stream)
    with training.Checkpointer(tmp_path / "c", identity) as saver:
        saver.save(state, stream)
        saver.wait()
        other = Stream()
        abstract = jax.eval_shape(lambda: state)
        restored = saver.restore(abstract, other)
    assert_equal(restored, state)
    assert jax.random.key_impl(restored.rng) == jax.random.key_impl(state.rng)
    assert other.at == 2
    folder = tmp_path / "c" / "1"
    metadata = json.loads((folder / "metadata" / "metadata").read_text())
    assert flora.Plan.from_json(json.dumps(metadata["plan"])) == identity.plan
    assert metadata["base"]["source"] == "seed 0"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert not any(p.suffix in (".pkl", ".pickle") for p in files)


def test_bytes_loader_states_round_trip(run, tmp_path):
    class Loader:
        state = b'{"position": 3}'

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    state, identity, _ = run
    other = Loader()
    other.state = b""
    with training.Checkpointer(tmp_path / "c", identity) as saver:
        saver.save(state, Loader())
        saver.wait()
        saver.restore(state, other)
    assert other.state == Loader.state


def test_last_and_best_stay(run, tmp_path):
    state, identity, _ = run
    options = {"keep": 2, "best": "eval/loss"}
    with training.Checkpointer(tmp_path / "c", identity, **options) as saver:
        for step, value in enumerate([3.0, 1.0, 2.0, 4.0, None], 1):
            saver.save(at(state, step), None, value and {"eval/loss": value})
        saver.wait()
        assert saver.steps() == [2, 4, 5]
    with training.Checkpointer(tmp_path / "c", identity, **options) as saver:
        assert (saver.latest(), saver.best_step()) == (5, 2)
        assert int(saver.restore(state, step=2).step) == 2
        with pytest.raises(RunError, match="no checkpoint of step 3 .* there are: "):
            saver.restore(state, step=3)


def test_refuses_another_plan_base_and_optimizer(run, tmp_path):
    state, identity, base = run
    with training.Checkpointer(tmp_path / "c", identity) as saver:
        saver.save(state)

    def restore(like=state, **changes):
        with training.Checkpointer(
            tmp_path / "c", dataclasses.replace(identity, **changes)
        ) as saver:
            saver.restore(like)

    rules = {key: dataclasses.replace(a, alpha=1.0) for key, a in RULES.items()}
    with pytest.raises(RunError, match="another plan; 'layers/down_proj/kernel' adapter: .*8.0"):
        restore(plan=flora.plan(base, rules))
    rules = {"layers/up_proj/kernel": RULES["layers/(up|down)_proj/kernel"]}
    with pytest.raises(RunError, match="only the checkpoint adapts 'layers/down_proj/kernel'"):
        restore(plan=flora.plan(base, rules))
    with pytest.raises(RunError, match="another base: .* .seed 0., this base is 123 .seed 1."):
        restore(base_fingerprint="123", base_source="seed 1")
    sgd = training.create_state(identity.plan, state.adapters, training.SGD(momentum=0.9))
    with pytest.raises(RunError, match="does not fit this run .another optimizer"):
        restore(sgd)


def test_fingerprint_sees_every_bit_path_and_dtype():
    x = jnp.linspace(-1.0, 1.0, 24, dtype=jnp.float32).reshape(2, 3, 4)
    seen = {training.fingerprint({"a": x})}

    def new(tree):
        seen.add(training.fingerprint(tree))
        return len(seen)

    assert training.fingerprint({"a": np.asarray(x)}) in seen
    assert new({"b": x}) == 2
    assert new({"a": x.reshape(2, 12)}) == 3
    assert new({"a": x.astype(jnp.bfloat16)}) == 4
    assert new({"a": x.at[1, 2, 3].set(-x[1, 2, 3])}) == 5
    assert new({"a": jnp.flip(x)}) == 6
    assert new({"a": x, "c": x}) == 7
    integers = jnp.arange(8)
    for dtype in ("int8", "uint8", "int4", "bool", "float16", "float8_e4m3fn", "int32"):
        count = len(seen)
        assert new({"a": integers.astype(dtype)}) == count + 1
        assert new({"a": integers.at[3].set(0).astype(dtype)}) == count + 2


def test_fingerprint_of_quantized_weights():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    quantized = flora.quantize({"q": {"kernel": w}}, {".*": flora.Format("int4", block=32)})
    other = flora.quantize({"q": {"kernel": w + 0.5}}, {".*": flora.Format("int4", block=32)})
    assert training.fingerprint(quantized) == training.fingerprint(quantized)
    assert training.fingerprint(quantized) != training.fingerprint(other)
