"""Members of one program against runs of their own: equal, isolated, resumable."""

import dataclasses
import json
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
from flora_jax import training
from flora_jax.core.errors import ConfigError
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.training import Members, RunDir, RunError
from flora_jax.training.members import kept_bytes

KERNELS = "layers/(up|down)_proj/kernel"
RULES = {KERNELS: flora.LoRA(rank=2, alpha=4.0, dropout=0.1)}
SEEDS, RATES = (0, 5), (0.5, 3.0)
ADAM = training.AdamW(learning_rate=training.Linear(start=1e-2, steps=10), weight_decay=0.1)


def assert_close(a, b, **kw):
    kw = {"rtol": 1e-5, "atol": 1e-6, **kw}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def alone(problem, optimizer, seed, steps=3, batches=None, **kw):
    loss, base, plan, _ = problem
    state = training.fresh_state(plan, base, optimizer, seed)
    step = training.make_step(loss, plan, optimizer, **kw)
    for _, batch in zip(range(steps), batches or Stream(), strict=False):
        state, metrics = step(state, base, batch)
    return state, metrics


def together(problem, optimizer, members, steps=3, batches=None, **kw):
    loss, base, plan, _ = problem
    states = members.states(plan, base, optimizer)
    step = training.make_members_step(loss, plan, optimizer, members, **kw)
    for _, batch in zip(range(steps), batches or Stream(), strict=False):
        states, metrics = step(states, base, batch)
    assert step._cache_size() == 1
    return states, metrics


@pytest.mark.parametrize(
    "optimizer",
    [ADAM, training.SGD(learning_rate=0.3, momentum=0.9, weight_decay=0.1)],
    ids=["AdamW", "SGD"],
)
def test_each_member_is_the_run_with_its_seed_and_rate(optimizer):
    """Dropout, decay, schedule, clipping and accumulation included."""
    problem = language_model(RULES)
    options = {"clip": 0.5, "accumulate": 2}
    states, metrics = together(problem, optimizer, Members(seeds=SEEDS, rates=RATES), **options)
    for i, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
        state, one = alone(problem, optimizer.scaled(rate), seed, **options)
        mine = training.member(states, i)
        assert_close(mine.train, state.train)
        assert_close(mine.frozen, state.frozen)
        np.testing.assert_allclose(metrics["loss"][i], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["lr"][i], one["lr"], rtol=1e-6)
        np.testing.assert_array_equal(*(jax.random.key_data(s.rng) for s in (mine, state)))
    assert len({float(x) for x in metrics["loss"]}) == 2


OTHERS = [
    training.Lion(learning_rate=1e-3, weight_decay=0.1),
    training.Adafactor(learning_rate=1e-2, min_dim_size_to_factor=2),
    training.lora_plus(training.AdamW(learning_rate=1e-3), 4.0),
    training.LIFT(learning_rate=1e-2, weight_decay=0.1, rank=1, filter_rank=2, refresh=2),
]


@pytest.mark.parametrize("optimizer", OTHERS, ids=lambda o: type(o).__name__)
def test_a_factor_on_the_updates_is_one_on_the_rate(optimizer):
    """The claim behind ``rates``, at the optimizer: three steps with 3 times the rate."""
    rng = np.random.default_rng(0)
    draw = lambda: {"q": {x: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for x in "ab"}}
    params, grads = draw(), [draw() for _ in range(3)]

    def run(optimizer, factor):
        tx = training.optim.build(optimizer, params)
        state, p = tx.init(params), params
        for g in grads:
            updates, state = tx.update(g, state, p)
            p = jax.tree.map(lambda x, u: x + factor * u, p, updates)
        return p

    rules = getattr(optimizer, "rules", [(".*", optimizer)])
    faster = training.Groups(rules=[(pattern, o.scaled(3.0)) for pattern, o in rules])
    assert optimizer.proportional
    assert_close(run(optimizer, 3.0), run(faster, 1.0))


def test_rates_need_proportional_updates():
    members = Members(seeds=(0, 1), rates=(1.0, 2.0))
    for optimizer in (
        training.Adafactor(weight_decay=0.1),
        training.optim.optax.adam(1e-3),
        training.Groups(rules={".*/a": training.AdamW(), ".*": training.optim.optax.sgd(1.0)}),
    ):
        with pytest.raises(ConfigError, match="not known to be proportional"):
            members.check(optimizer)
        Members(seeds=(0, 1)).check(optimizer)
    for wrong, message in (
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (0, 1), "rates": (1.0,)}, "1 rates for 2 seeds"),
        ({"seeds": (0,), "rates": (-1.0,)}, "positive factors"),
        ({"seeds": (0,), "batches": "mine"}, "'mine' is not one of shared, own"),
    ):
        with pytest.raises(ConfigError, match=message):
            Members(**wrong)
    with pytest.raises(ConfigError, match="member 2 of 2: they are numbered 0 to 1"):
        training.member({"a": jnp.zeros((2, 3))}, 2)


@pytest.mark.parametrize(
    "method",
    [
        flora.DoRA(rank=2),
        flora.PiSSA(rank=2),
        flora.NOLA(rank=2, k=6, l=6, chunk=4),
        flora.Replace(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_any_method(method):
    problem = language_model({"layers/up_proj/kernel": method})
    states, _ = together(problem, ADAM, Members(seeds=(0, 1)), steps=2)
    state, _ = alone(problem, ADAM, 1, steps=2)
    assert_close(training.member(states, 1).adapters, state.adapters, rtol=1e-4, atol=1e-5)


def test_own_batches_and_one_evaluation_each():
    problem = loss, base, plan, _ = language_model(RULES)
    streams = [Stream(), Stream()]
    next(streams[1])
    batches = training.StackedBatches(streams)
    states, _ = together(problem, ADAM, Members(seeds=(3, 4), batches="own"), 2, batches)
    position = json.loads(json.dumps(batches.get_state()))
    assert position == {"streams": [{"at": 2}, {"at": 3}]}
    batches.set_state({"streams": [{"at": 0}, {"at": 1}]})
    assert next(batches)["tokens"].shape == (2, 8, 12)
    held_out = [batch for batch, _ in zip(Stream(), range(2), strict=False)]
    evaluate = training.make_members_evaluator(loss, plan)
    figures = evaluate(states, base, held_out)
    for i, seed in enumerate((3, 4)):
        stream = Stream()
        [next(stream) for _ in range(i)]
        state, _ = alone(problem, ADAM, seed, 2, stream)
        assert_close(training.member(states, i).train, state.train)
        one = training.make_evaluator(loss, plan)(state, base, held_out)
        for name, value in one.items():
            np.testing.assert_allclose(figures[name][i], value, rtol=1e-5)


def scans(step, *arguments):
    """Lengths of the step's outermost scans: over chunks of members, or over the layers."""
    (jitted,) = jax.make_jaxpr(step)(*arguments).eqns
    return [e.params["length"] for e in jitted.params["jaxpr"].eqns if e.primitive.name == "scan"]


@pytest.mark.parametrize(("batches", "smaller"), [("shared", 2), ("own", 1)])
def test_chunks_of_members_are_the_same_members(batches, smaller):
    """Dropout and rates included; three in chunks of two (and a remainder), and one by one."""
    problem = language_model(RULES)
    ends = []
    for chunk in (3, smaller):
        members = Members(seeds=(0, 1, 2), rates=(1.0, 2.0, 3.0), batches=batches, chunk=chunk)
        own = training.StackedBatches([Stream(), Stream(), Stream()]) if batches == "own" else None
        ends.append(together(problem, ADAM, members, 2, own))
    (states, metrics), (expected, before) = ends
    assert_close(states.train, expected.train)
    assert_close(metrics["loss"], before["loss"])
    with pytest.raises(ConfigError, match=r"Members.chunk=4 is outside 0..3"):
        Members(seeds=(0, 1, 2), chunk=4)
    assert members.to_json() == dataclasses.replace(members, chunk=0).to_json()


def test_on_a_cpu_chunks_keep_the_memory_small(monkeypatch):
    loss, base, plan, _ = language_model(RULES)
    members = Members(seeds=tuple(range(11)))
    states, batch = members.states(plan, base, ADAM), next(Stream())
    kept = kept_bytes(loss, plan, training.member(states, 0), base, batch)
    activations = batch["tokens"].size * 16 * 4
    assert activations < kept < 100 * activations
    layers = scans(training.make_members_step(loss, plan, ADAM, members), states, base, batch)
    assert not {5, 11} & set(layers)
    for budget, chunks in ((2 * kept, 5), (kept, 11), (1, 11)):  # 11 = 5 * 2 and a remainder
        monkeypatch.setattr("flora_jax.training.members.CPU_KEPT", budget)
        step = training.make_members_step(loss, plan, ADAM, members)
        assert scans(step, states, base, batch)[0] == chunks


def test_lift_alone_in_its_chunk_refreshes_only_when_due():
    """Under ``vmap`` its cond is a select, which finds a new mask at every step."""
    loss, base, plan, _ = language_model({"layers/up_proj/kernel": flora.Replace()})
    lift = training.LIFT(learning_rate=1e-2, rank=1, filter_rank=2, refresh=2)
    for chunk, conditional in ((1, True), (2, False)):
        members = Members(seeds=(0, 1), chunk=chunk)
        step = training.make_members_step(loss, plan, lift, members)
        text = step.lower(members.states(plan, base, lift), base, next(Stream())).as_text()
        assert ("stablehlo.case" in text) == conditional


def poisoned(loss):
    """NaN for a member whose ``a[0, 0, 0]`` has the sign of the batch's ``poison``."""

    def call(bound, batch, rng, train):
        total, weight, aux = loss(bound, batch, rng, train)
        a = bound["layers"]["up_proj"]["kernel"].bound[0].params["a"]
        return total + jnp.where(batch["poison"][0] * a[0, 0, 0] > 0, jnp.nan, 0.0), weight, aux

    return call


class Poison(Stream):
    """Batch 2 stops the members with positive ``a[0, 0, 0]``; ``both = -1``: batch 4 the others."""

    def __next__(self):
        batch = super().__next__()
        value = {1: 0.0, 2: 1.0, 3: 0.0}.get(self.at, float(self.both))
        return {**batch, "poison": np.full((8,), value, np.float32)}

    both = 0.0


PLAIN = {"layers/up_proj/kernel": flora.LoRA(rank=2, alpha=4.0)}
MEMBERS = Members(seeds=(0, 1, 2, 3, 4, 5))


def signs(problem):
    _, base, plan, _ = problem
    start = MEMBERS.states(plan, base, ADAM).train["layers/up_proj/kernel"]["a"]
    return np.asarray(start[:, 0, 0, 0]) > 0


def test_a_member_that_is_not_finite_stops_alone():
    problem = loss, base, plan, _ = language_model(PLAIN)
    hit = signs(problem)
    assert 0 < hit.sum() < 6
    bad = (poisoned(loss), base, plan, None)
    two, m2 = together(bad, ADAM, MEMBERS, 2, Poison())
    assert (np.asarray(m2["ok"]) == ~hit).all()
    three, m3 = together(bad, ADAM, MEMBERS, 3, Poison())  # batch 3 is clean again
    assert (np.asarray(m3["ok"]) == ~hit).all()
    assert three.step.tolist() == [1 if h else 3 for h in hit]
    one, _ = together(problem, ADAM, MEMBERS, 1)
    for i, h in enumerate(hit):
        if h:
            mine, before = training.member(three, i), training.member(one, i)
            assert_close(mine.train, before.train)
            assert training.bad_paths(training.member(m2, i)) == []  # the loss alone was not finite
        else:
            mine, clean = training.member(three, i), alone(problem, ADAM, MEMBERS.seeds[i], 3)[0]
            assert_close(mine.train, clean.train)


def fit(problem, folder, data, steps, **kw):
    loss, base, plan, _ = problem
    options = {"log_every": 1, "progress": False, "optimizer": ADAM, "members": MEMBERS, **kw}
    return training.fit(loss, plan, base, data, steps=steps, run_dir=folder, **options)


def test_fit_resumes_all_members_and_tells_of_each(tmp_path, capsys):
    problem = loss, base, plan, _ = language_model(PLAIN)
    hit = signs(problem)
    bad = (poisoned(loss), base, plan, None)
    held_out = [{**next(Stream()), "poison": np.zeros(8, np.float32)}]
    evals = {"evals": {"eval": held_out}, "eval_every": 2, "progress": True}
    straight = fit(bad, tmp_path / "straight", Poison(), 6, **evals)
    err = capsys.readouterr().err
    for i, h in enumerate(hit):
        assert (f"step 2: member {i} stops: loss nan" in err) == h
    fit(bad, tmp_path / "run", Poison(), 4, **evals)
    resumed = fit(bad, tmp_path / "run", Poison(), 6, **evals)
    keyless = lambda s: (s.step, s.train, s.frozen, s.opt_state)
    jax.tree.map(np.testing.assert_array_equal, keyless(resumed.state), keyless(straight.state))
    assert resumed.state.step.tolist() == [1 if h else 6 for h in hit]
    lines = [RunDir(tmp_path / name).metrics() for name in ("straight", "run")]
    figures = [[{k: v for k, v in x.items() if "perf" not in k} for x in run] for run in lines]
    assert figures[0] == figures[1] and len(figures[0]) == 6
    last = figures[0][-1]
    good = [last[f"eval/loss/{i}"] for i, h in enumerate(hit) if not h]
    assert last["eval/loss"] == pytest.approx(np.mean(good)) and len(set(good)) == len(good)
    with pytest.raises(RunError, match="checkpoint of other members"):
        other = Members(seeds=MEMBERS.seeds, rates=(0.5,) * 6)
        fit(bad, tmp_path / "run", Poison(), 7, members=other)


def test_the_run_ends_with_its_last_member(tmp_path):
    loss, base, plan, _ = language_model(PLAIN)
    stream = Poison()
    stream.both = -1.0  # from batch 4 on the others
    with pytest.raises(RunError, match="step 4: loss nan.*last good checkpoint: step 2"):
        fit((poisoned(loss), base, plan, None), tmp_path / "run", stream, 9, save_every=2)


@pytest.mark.optimised
def test_the_base_is_not_copied_for_each_member():
    """Read off the compiled program: four copies of the base would be 150 MB."""
    config = LlamaConfig.tiny(
        hidden_size=256, intermediate_size=512, num_hidden_layers=16, remat="full"
    )
    model = Llama(config)
    base = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    )
    plan = flora.plan(base, {"layers/self_attn/(q|v)_proj/kernel": flora.LoRA(rank=1)})
    members = Members(seeds=(0, 1, 2, 3))
    states = jax.eval_shape(lambda b: members.states(plan, b, ADAM), base)
    step = training.make_members_step(training.CausalLM(model=model), plan, ADAM, members)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    batch = {"tokens": ids, "targets": ids}
    cost = training.compiled_cost(step, states, base, batch)
    whole = sum(x.size * 4 for x in jax.tree.leaves(base))
    assert whole > 35e6
    assert cost["argument_bytes"] < 1.05 * whole
    assert cost["temp_bytes"] < 0.5 * whole


MESH = """
import sys
import jax, numpy as np
from test_members import ADAM, PLAIN, Stream, language_model
from flora_jax import training
loss, base, plan, _ = language_model(PLAIN)
members = training.Members(seeds=(0, 1, 2, 3), rates=(1.0, 0.5, 2.0, 3.0))
ends = []
for mesh in (None, training.make_mesh({"member": 4, "fsdp": 2})):
    result = training.fit(loss, plan, base, Stream(), steps=3, members=members, optimizer=ADAM,
                          mesh=mesh, run_dir=f"{sys.argv[1]}/{mesh is None}", progress=False)
    ends.append(jax.device_get((result.state.train, result.state.opt_state)))
a = result.state.train["layers/up_proj/kernel"]["a"]
print("devices", jax.device_count(), tuple(a.sharding.spec))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
jax.tree.map(close, *ends)
print("same")
"""


def test_members_spread_over_a_mesh(tmp_path):
    environment = simulated(8, os.path.dirname(__file__))
    command = [sys.executable, "-c", MESH, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "devices 8 ('member', None, 'fsdp', None)" in done.stdout and "same" in done.stdout


def test_own_batches_have_no_layout_on_a_mesh(tmp_path):
    mesh = training.make_mesh({"data": -1})
    with pytest.raises(ConfigError, match="Members.batches='own' has no layout on a mesh"):
        own = Members(seeds=(0, 1), batches="own")
        fit(language_model(PLAIN), tmp_path / "run", Stream(), 1, members=own, mesh=mesh)
