"""EVA: the checks of its method card."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as flora
from flora_jax.adapters.eva import allocate, components, with_ranks
from flora_jax.core import ops
from flora_jax.core.errors import FloraError, PlanError


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def shaped(rank, batches, n_in, seed=0):
    """Batches of inputs whose variance falls along ``rank`` directions, around a mean."""
    axes = np.linalg.qr(r(n_in, rank, seed=seed))[0] * np.logspace(0, -1, rank)
    return [r(20, rank, seed=i + seed) @ axes.T + 2.0 for i in range(batches)]


def run(p, x):
    return ops.dot(x, p["kernel"])


def moments(x):
    return {"gram": x.T @ x, "sum": x.sum(0), "count": jnp.asarray(float(len(x)))}


def cosines(a, b):
    return np.abs(np.sum(np.asarray(a) * np.asarray(b), axis=0))


def test_batches_equal_one_shot_equal_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    batches = shaped(5, 4, 9)
    params = {"kernel": r(9, 6)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=3)})
    whole = np.concatenate(batches)
    found = {}
    for name, given in {"parts": batches, "whole": [whole]}.items():
        stats = flora.calibrate(run, params, plan, given)
        found[name] = flora.init(plan, jax.random.key(0), params, stats=stats)["kernel"]
        assert (found[name]["b"] == 0).all()
    np.testing.assert_allclose(found["parts"]["a"], found["whole"]["a"], atol=1e-3)
    pca = decomposition.PCA(3).fit(whole)
    np.testing.assert_allclose(cosines(found["parts"]["a"], pca.components_.T), 1.0, atol=1e-4)
    steps = decomposition.IncrementalPCA(9)
    for batch in batches:
        steps.partial_fit(batch)
    np.testing.assert_allclose(cosines(found["parts"]["a"], steps.components_[:3].T), 1, atol=1e-3)
    got = components(moments(whole), 5)
    np.testing.assert_allclose(got.values**0.5, steps.singular_values_[:5], rtol=1e-3)
    np.testing.assert_allclose(got.ratios, steps.explained_variance_ratio_[:5], rtol=1e-3)


def test_uncentred_is_the_svd_of_the_inputs_and_whitening_divides():
    x = shaped(4, 1, 7)[0]
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    plain = components(moments(x), 3, center=False)
    np.testing.assert_allclose(cosines(plain.vectors, vt[:3].T), 1.0, atol=1e-4)
    np.testing.assert_allclose(plain.values**0.5, s[:3], rtol=1e-3)
    params = {"kernel": r(7, 6)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=3, center=False, whiten=True)})
    stats = flora.calibrate(run, params, plan, [x])
    a = flora.init(plan, jax.random.key(0), params, stats=stats)["kernel"]["a"]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), s[:3] ** -0.5, rtol=1e-3)


def test_a_subspace_is_recovered():
    """Inputs in a 3-dimensional affine subspace: principal angles below 1e-3."""
    basis = np.linalg.qr(r(12, 3))[0]
    x = r(50, 3) @ basis.T + r(12)
    found = components(moments(x), 3)
    angles = np.arccos(np.clip(np.linalg.svd(basis.T @ found.vectors)[1], -1, 1))
    assert angles.max() < 1e-3
    np.testing.assert_allclose(found.ratios.sum(), 1.0, atol=1e-5)


# Ranks ------------------------------------------------------------------------------------------
def model():
    """Two weights that read the same inputs, one that reads others, a scanned stack of three."""
    params = {
        "q": {"kernel": r(8, 8)},
        "k": {"kernel": r(8, 8, seed=1)},
        "flat": {"kernel": r(8, 8, seed=2)},
        "layers": {"kernel": r(3, 8, 8) / 3},
    }

    def apply(p, x):
        y = ops.dot(x, p["q"]["kernel"]) + ops.dot(x, p["k"]["kernel"])
        y = y + ops.dot(jnp.sin(40.0 * x), p["flat"]["kernel"])
        body = lambda h, w: (jnp.tanh(ops.dot(h, w["kernel"])), None)
        return jax.lax.scan(body, y, p["layers"])[0]

    return params, apply


BATCHES = shaped(4, 12, 8)


@pytest.fixture(scope="module")
def moved():
    params, apply = model()
    plan = flora.plan(params, {".*": flora.EVA(rank=3, alpha=6, rho=2.0, tau=0.99)})
    return params, apply, plan, flora.eva(apply, params, plan, BATCHES)


def ranks_of(plan):
    return {e.path: e.adapter.ranks or (e.adapter.rank,) * max(1, *e.stack, 1) for e in plan}


def test_the_budget_is_kept_and_goes_where_the_variance_is(moved):
    params, apply, plan, start = moved
    ranks = ranks_of(start.plan)
    assert sum(map(sum, ranks.values())) == 3 * 6
    assert max(max(own) for own in ranks.values()) <= 6
    assert len(set(sum(ranks.values(), ()))) > 1, "ranks did not move"
    assert ranks["q/kernel"] == ranks["k/kernel"]
    for entry in start.plan:
        assert entry.adapter.scale == pytest.approx(2.0)
    stats = start.stats
    ratios = {
        path: np.asarray(jax.vmap(lambda s: components(s, 6).ratios)(stats[path]))
        if path == "layers/kernel"
        else np.asarray(components(stats[path], 6).ratios)[None]
        for path in stats
    }
    taken = [v for p, own in ranks.items() for l, k in enumerate(own) for v in ratios[p][l, :k]]
    left = [v for p, own in ranks.items() for l, k in enumerate(own) for v in ratios[p][l, k:]]
    assert min(taken) >= max(left) - 1e-6
    assert start.plan.count == sum(16 * sum(own) for own in ranks.values())


def test_equal_inputs_get_equal_subspaces_and_it_starts_at_the_base(moved):
    params, apply, _, start = moved
    adapters = flora.init(start.plan, jax.random.key(0), params, stats=start.stats)
    np.testing.assert_array_equal(adapters["q/kernel"]["a"], adapters["k/kernel"]["a"])
    bound = flora.bind(params, adapters, start.plan)
    np.testing.assert_allclose(apply(bound, BATCHES[0]), apply(params, BATCHES[0]), atol=1e-6)


def test_rho_one_leaves_ranks_alone():
    params, apply = model()
    plan = flora.plan(params, {".*": flora.EVA(rank=3, rho=1.0)})
    assert flora.eva(apply, params, plan, BATCHES[:2]).plan == plan


def test_it_stops_when_components_stand_still(moved):
    _, _, _, start = moved
    assert (start.batches, start.converged) == (len(BATCHES), False), "flat inputs have no axes"
    params = {"kernel": r(8, 8)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=3, tau=0.999)})
    start = flora.eva(run, params, plan, BATCHES)
    assert start.converged and 2 < start.batches < len(BATCHES)
    assert float(start.stats["kernel"]["count"]) == 20 * start.batches
    again = flora.eva(run, params, plan, [BATCHES[0]] * 5)
    assert (again.batches, again.converged) == (2, True)
    strict = flora.plan(params, {"kernel": flora.EVA(rank=3, tau=1.0)})
    ended = flora.eva(run, params, strict, BATCHES[:3])
    assert (ended.batches, ended.converged) == (3, False)


def test_padding_never_gets_a_gradient():
    """A layer's columns beyond its own rank stay zero through training."""
    params = {"layers": {"kernel": r(2, 8, 8)}}
    rules = {".*": flora.EVA(rank=3, alpha=6, ranks=(3, 1))}
    plan = flora.plan(params, rules)
    assert plan.count == 16 * 4
    assert flora.Plan.from_json(plan.to_json()) == plan
    stats = {"layers/kernel": jax.vmap(moments)(r(2, 20, 8))}
    adapters = flora.init(plan, jax.random.key(0), params, stats=stats)
    tx = optax.adamw(0.1, weight_decay=0.1)
    state = tx.init(adapters)

    def loss(a, x):
        body = lambda h, w: (jnp.tanh(ops.dot(h, w["kernel"])), None)
        return jnp.sum(jax.lax.scan(body, x, flora.bind(params, a, plan)["layers"])[0] ** 2)

    @jax.jit
    def step(a, state, x):
        g = jax.grad(loss)(a, x)
        updates, state = tx.update(g, state, a)
        return optax.apply_updates(a, updates), state

    for i in range(5):
        adapters, state = step(adapters, state, r(4, 8, seed=i))
    a, b = (adapters["layers/kernel"][n] for n in "ab")
    assert (a[1, :, 1:] == 0).all() and (b[1, 1:] == 0).all()
    assert np.abs(a[0]).min() > 0 and np.abs(b[0]).max(1).min() > 0 and np.abs(b[1, 0]).max() > 0


def test_ties_and_weights_without_a_rank():
    params = {name: {"kernel": r(4, 4)} for name in ("one", "two", "zero")}
    plan = flora.plan(params, {".*": flora.EVA(rank=1, rho=3.0, rslora=True, alpha=3)})
    ratios = {"one": [0.5, 0.2, 0.2], "two": [0.5, 0.2, 0.2], "zero": [0.1] * 3}
    ranks = allocate(plan, {f"{name}/kernel": np.array(own) for name, own in ratios.items()})
    assert {path: int(own) for path, own in ranks.items()} == {
        "one/kernel": 2,
        "two/kernel": 1,
        "zero/kernel": 0,
    }
    moved = with_ranks(plan, ranks)
    assert [entry.path for entry in moved] == ["one/kernel", "two/kernel"]
    assert [entry.adapter.scale for entry in moved] == pytest.approx([3.0, 3.0])


def test_each_expert_and_group_has_a_rank_of_its_own():
    params = {"kernel": r(3, 3, 4, 8)}
    specs = {"kernel": flora.KernelSpec.conv(2, groups=2)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=2)}, specs=specs)
    x = r(2, 6, 6, 8).at[..., :4].multiply(jnp.array([5.0, 0.1, 0.1, 0.1]))
    conv = lambda p, x: ops.conv(x, p["kernel"], groups=2)
    start = flora.eva(conv, params, plan, [x])
    assert sum(start.plan["kernel"].adapter.ranks) == 4
    adapters = flora.init(start.plan, jax.random.key(0), params, stats=start.stats)
    used = np.any(np.asarray(adapters["kernel"]["a"]) != 0, axis=1).sum(1)
    assert tuple(used) == start.plan["kernel"].adapter.ranks


def test_masked_rows_do_not_count():
    params = {"kernel": r(6, 5)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=2)})
    x, keep = r(4, 3, 6), jnp.array([[1, 1, 0]] * 4)
    junk = jnp.where(keep[..., None] > 0, x, 100.0)
    start = flora.eva(run, params, plan, [junk], mask=lambda _: keep)
    only = components(moments(x[:, :2].reshape(-1, 6)), 2)
    found = components(start.stats["kernel"], 2)
    np.testing.assert_allclose(found.vectors, only.vectors, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.EVA(rank=2, rho=0.5), "rho=0.5 is below 1"),
        (flora.EVA(rank=2, tau=0.0), "tau=0.0 is outside"),
        (flora.EVA(rank=2, initializer="gaussian"), "EVA starts from the inputs"),
        (flora.EVA(rank=2, ranks=(1, 3)), "is not rank=2"),
        (flora.EVA(rank=5), "rank=5 is outside 1..4"),
    ],
)
def test_messages(adapter, message):
    with pytest.raises(PlanError, match=f"^kernel: .*{message}"):
        flora.plan({"kernel": r(6, 4)}, {"kernel": adapter})


def test_bad_requests():
    params = {"kernel": r(6, 4)}
    plan = flora.plan(params, {"kernel": flora.EVA(rank=2)})
    with pytest.raises(PlanError, match="kernel: EVA starts from the weight's inputs"):
        flora.init(plan, jax.random.key(0), params)
    with pytest.raises(FloraError, match="no batches"):
        flora.eva(run, params, plan, [])
    lora = flora.plan(params, {"kernel": flora.LoRA(rank=2)})
    with pytest.raises(PlanError, match="no EVA adapter"):
        flora.eva(run, params, lora, [r(3, 6)])
    given = flora.plan(params, {"kernel": flora.EVA(rank=2, ranks=(2,))})
    with pytest.raises(PlanError, match="given out already"):
        flora.eva(run, params, given, [r(3, 6)])
    twice = flora.plan(params, {"kernel": flora.EVA(rank=2, ranks=(2, 1))})
    stats = {"kernel": moments(r(9, 6))}
    with pytest.raises(PlanError, match="2 ranks for a stack of 1"):
        flora.init(twice, jax.random.key(0), params, stats=stats)
