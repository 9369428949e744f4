"""The closed forms of SVFit and SoKA, and the ranks they read from spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters import soka, spectra
from flora_jax.core import ops
from flora_jax.core.errors import PlanError


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def one(adapter, kernel):
    params = {"kernel": kernel}
    plan = flora.plan(params, {"kernel": adapter})
    return params, plan, flora.init(plan, jax.random.key(1), params)


def weight(params, adapters, plan):
    return flora.materialize(flora.bind(params, adapters, plan))["kernel"]


def count(adapter, *shape):
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flora.plan({"kernel": kernel}, {"kernel": adapter}).count


# SVFit ------------------------------------------------------------------------------------------
def test_svfit_count_is_a_sixteenth_of_lora():
    assert count(flora.SVFit(), 768, 768) == 768
    assert count(flora.LoRA(rank=8), 768, 768) == 16 * 768
    assert count(flora.SVFit(rank=5), 30, 20) == 5


def test_svfit_starts_as_the_base_to_the_last_bit():
    params, plan, adapters = one(flora.SVFit(), r(8, 6))
    x = r(5, 8)
    bound = flora.bind(params, adapters, plan)
    np.testing.assert_array_equal(ops.dot(x, bound["kernel"]), ops.dot(x, params["kernel"]))


def test_svfit_gradient_and_newton_step():
    """dL/ds_i = u_i^T G v_i with G = dL/dW; with r = 1 a parabola in one number."""
    params, plan, adapters = one(flora.SVFit(rank=3), r(8, 6))
    x, target = r(9, 8), r(9, 6)
    frozen = {n: adapters["kernel"][n] for n in ("s0", "u", "vt")}

    def loss(s, keep=slice(None)):
        arrays = {"s": s, "s0": frozen["s0"][keep], "u": frozen["u"][:, keep]}
        arrays["vt"] = frozen["vt"][keep]
        own = flora.plan(params, {"kernel": flora.SVFit(rank=len(s))})
        y = ops.dot(x, flora.bind(params, {"kernel": arrays}, own)["kernel"])
        return 0.5 * jnp.sum(jnp.square(y - target))

    s = adapters["kernel"]["s"] + jnp.array([0.3, -0.2, 0.5])
    w = weight(params, {"kernel": {**frozen, "s": s}}, plan)
    g = x.T @ (x @ w - target)
    expected = jnp.einsum("ir,io,ro->r", frozen["u"], g, frozen["vt"])
    np.testing.assert_allclose(jax.grad(loss)(s), expected, rtol=1e-4, atol=1e-4)

    top = lambda s: loss(s, slice(1))
    start = frozen["s0"][:1]
    direction = x @ frozen["u"][:, :1] @ frozen["vt"][:1]
    best = start + jnp.vdot(direction, target - x @ params["kernel"]) / jnp.vdot(
        direction, direction
    )
    np.testing.assert_allclose(jax.grad(top)(best), 0.0, atol=1e-3)


def test_svfit_merged_weight_has_the_same_singular_vectors():
    params, plan, adapters = one(flora.SVFit(), r(8, 6))
    own = adapters["kernel"]
    new = jnp.array([9.0, 7.0, 5.0, 3.0, 2.0, 1.0])
    w = weight(params, {"kernel": {**own, "s": new}}, plan)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(s, new, rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(u * own["u"], axis=0)), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(vt * own["vt"], axis=1)), 1.0, atol=1e-4)


def test_svfit_does_not_depend_on_signs_or_order():
    params, plan, adapters = one(flora.SVFit(rank=4), r(8, 6))
    own = {**adapters["kernel"], "s": adapters["kernel"]["s"] + r(4)}
    order, sign = jnp.array([2, 0, 3, 1]), jnp.array([1.0, -1.0, -1.0, 1.0])
    other = {n: own[n][order] for n in ("s", "s0")}
    other |= {"u": own["u"][:, order] * sign, "vt": own["vt"][order] * sign[:, None]}
    np.testing.assert_allclose(
        weight(params, {"kernel": own}, plan), weight(params, {"kernel": other}, plan), atol=1e-5
    )


def test_svfit_fits_a_change_of_the_spectrum_that_lora_of_16_times_the_numbers_cannot():
    """Teacher W0 + U diag(delta) V^T, inputs N(0, I): the loss is |W - W*|_F^2."""
    d = 32
    w0 = r(d, d)
    u, _, vt = jnp.linalg.svd(w0)
    delta = 0.5 + jnp.abs(r(d))
    teacher = w0 + (u * delta) @ vt
    params, plan, adapters = one(flora.SVFit(), w0)
    frozen = {n: a for n, a in adapters["kernel"].items() if n != "s"}

    def loss(s):
        y = ops.dot(jnp.eye(d), flora.bind(params, {"kernel": {**frozen, "s": s}}, plan)["kernel"])
        return jnp.sum(jnp.square(y - teacher))

    s = adapters["kernel"]["s"]
    start = loss(s)
    for _ in range(3):
        s = s - 0.5 * jax.grad(loss)(s)
    assert plan.count == d
    assert loss(s) < 1e-6 * start
    # 16 times as many numbers: rank 8 of 32, and no rank-8 change is closer than Eckart-Young.
    assert count(flora.LoRA(rank=8), d, d) == 16 * d
    floor = np.sum(np.square(np.sort(delta)[:-8]))
    assert floor > 0.3 * start


# SoKA -------------------------------------------------------------------------------------------
def kron_sum(left, right):
    return sum(jnp.kron(a, b) for a, b in zip(left, right))


def test_soka_counts():
    assert count(flora.SoKA(rank=1), 4096, 4096) == 8192
    assert count(flora.SoKA(rank=3), 12, 8) == 3 * (3 * 2 + 4 * 4)
    assert count(flora.SoKA(rank=2, factor=4), 12, 8) == 2 * (4 * 4 + 3 * 2)
    assert count(flora.SoKA(rank=2), 3, 3, 12, 8) == 2 * (3 * 2 + 9 * 4 * 4)
    assert count(flora.SoKA(rank=1), 13, 8) == 1 * 2 + 13 * 4


def test_soka_with_all_terms_is_the_weight():
    for kernel in (r(12, 8), r(3, 2, 12, 8)):
        _, _, adapters = one(flora.SoKA(rank=6), kernel)
        own = adapters["kernel"]
        if kernel.ndim == 2:
            total = kron_sum(own["left0"], own["right0"])
        else:
            right = own["right0"].reshape(6, 3, 2, 4, 4)
            pairs = [[kron_sum(own["left0"], right[:, h, w]) for w in range(2)] for h in range(3)]
            total = jnp.array(pairs)
        np.testing.assert_allclose(total, kernel, atol=1e-5)


def test_soka_error_is_the_tail_of_the_spectrum():
    kernel = r(12, 8)
    values = np.linalg.svd(soka.rearrange(kernel, 3, 2), compute_uv=False)
    for rank in (1, 2, 4):
        _, _, adapters = one(flora.SoKA(rank=rank), kernel)
        left, right = (adapters["kernel"][n] for n in ("left0", "right0"))
        error = np.linalg.norm(kernel - kron_sum(left, right))
        np.testing.assert_allclose(error, np.sqrt(np.sum(values[rank:] ** 2)), rtol=1e-4)
        norms = np.linalg.norm(left, axis=(1, 2)) * np.linalg.norm(right, axis=(1, 2))
        np.testing.assert_allclose(norms, values[:rank], rtol=1e-4)


def test_soka_finds_one_kronecker_product():
    kernel = jnp.kron(r(3, 2), r(4, 4))
    params, plan, _ = one(flora.SoKA(rank=2), kernel)
    values = np.linalg.svd(soka.rearrange(kernel, 3, 2), compute_uv=False)
    assert values[1] < 1e-5 * values[0]
    assert flora.spectral_ranks(plan, params, energy=0.9999)["kernel"].adapter.rank == 1


def test_soka_rebase_folds_the_start():
    params, plan, adapters = one(flora.SoKA(rank=2), r(12, 8))
    moved = {"kernel": {**adapters["kernel"], "left": adapters["kernel"]["left"] + 1.0}}
    base, lean = flora.rebase(params, moved, plan)
    assert set(lean["kernel"]) == {"left", "right"}
    np.testing.assert_allclose(weight(base, lean, plan), weight(params, moved, plan), atol=1e-5)


def test_soka_reach():
    """What r terms can fit: sum A0 (x) B0 + Delta must have Kronecker rank r.

    A change of one factor of the leading term is reached exactly with r = 1, where no LoRA of as
    many numbers can; a Kronecker product in general is not, and the floor is the next value of the
    spectrum.
    """
    kernel = r(16, 16)
    params, plan, adapters = one(flora.SoKA(rank=1), kernel)
    own = adapters["kernel"]
    delta = jnp.kron(own["left0"][0], r(4, 4, seed=5))
    teacher = kernel + delta

    def loss(train):
        arrays = {"kernel": {**own, **train}}
        y = ops.dot(jnp.eye(16), flora.bind(params, arrays, plan)["kernel"])
        return jnp.sum(jnp.square(y - teacher))

    @jax.jit
    def fit(train):
        step = lambda t, _: (jax.tree.map(lambda a, g: a - 0.02 * g, t, jax.grad(loss)(t)), None)
        return jax.lax.scan(step, train, length=600)[0]

    train = {n: own[n] for n in ("left", "right")}
    start = loss(train)
    assert loss(fit(train)) < 1e-6 * start
    assert plan.count == 32 == count(flora.LoRA(rank=1), 16, 16)
    floor = np.sum(np.linalg.svd(delta, compute_uv=False)[1:] ** 2)
    assert floor > 0.3 * start

    general = jnp.kron(own["left0"][0], own["right0"][0]) + jnp.kron(
        r(4, 4, seed=6), r(4, 4, seed=7)
    )
    values = np.linalg.svd(soka.rearrange(general, 4, 4), compute_uv=False)
    assert values[1] > 1.0 and values[2] < 1e-4


def test_soka_pruned_terms_stay_pruned():
    params, plan, adapters = one(flora.SoKA(rank=4), r(12, 8))
    own = dict(adapters["kernel"])
    own["left"] = own["left"] * jnp.array([1.0, 1e-3, 1.0, 1e-3])[:, None, None]
    cut = jax.jit(soka.prune, static_argnums=1)(own, 0.05)
    assert (int(soka.terms(own)), int(soka.terms(cut))) == (4, 2)
    for name in ("left", "right"):
        np.testing.assert_array_equal(cut[name][1::2], 0.0)
        np.testing.assert_array_equal(cut[name][::2], own[name][::2])
        np.testing.assert_array_equal(cut[f"{name}0"], own[f"{name}0"])
    run = lambda t: jnp.sum(
        ops.dot(r(3, 12), flora.bind(params, {"kernel": t}, plan)["kernel"]) ** 2
    )
    grads = jax.grad(run)(cut)
    for name in ("left", "right"):
        assert (grads[name][1::2] == 0).all() and (np.abs(grads[name][::2]) > 0).all()
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2.0 * a]), own)
    assert soka.terms(soka.prune(stacked, 0.05)).tolist() == [2, 2]


# Ranks ------------------------------------------------------------------------------------------
def test_rank_rules_on_a_synthetic_spectrum():
    values = np.array([10.0, 9.0, 8.0, 1.0, 0.9, 0.8])
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert [spectra.energy_rank(values, e) for e in (0.1, 0.5, 0.98, 0.999, 1.0)] == [1, 2, 3, 6, 6]
    assert all(spectra.energy_rank(values, shares[k]) == k + 1 for k in range(6))
    assert spectra.elbow_rank(values) == 3
    assert spectra.elbow_rank(2.0 ** -np.arange(8)) == 1
    assert spectra.elbow_rank(values[:2]) == 2
    with pytest.raises(PlanError, match="energy=1.5"):
        spectra.energy_rank(values, 1.5)


def with_spectrum(values, n_in, n_out):
    u, v = np.linalg.qr(r(n_in, n_in))[0], np.linalg.qr(r(n_out, n_out))[0]
    return jnp.asarray(u[:, : len(values)] * values @ v[: len(values)], jnp.float32)


def test_spectral_ranks_of_a_plan():
    values = np.array([10.0, 9.0, 8.0, 1.0, 0.9, 0.8])
    params = {
        "layers": {"q": {"kernel": jnp.stack([with_spectrum(values[:2], 8, 6),
                                              with_spectrum(values, 8, 6)])}},
        "head": {"kernel": with_spectrum(values, 7, 9)},
        "norm": {"kernel": with_spectrum(values, 6, 6)},
    }  # fmt: skip
    rules = {".*q/kernel": flora.SVFit(), "head/kernel": flora.PiSSA(rank=1),
             "norm/kernel": flora.LoRA(rank=2)}  # fmt: skip
    plan = flora.plan(params, rules)
    ranks = lambda **kw: [e.adapter.rank for e in flora.spectral_ranks(plan, params, **kw)]
    by_path = [e.path for e in plan]
    expected = {"layers/q/kernel": 6, "head/kernel": 6, "norm/kernel": 2}
    assert ranks(energy=0.999) == [expected[p] for p in by_path]
    expected |= {"layers/q/kernel": 3, "head/kernel": 3}
    assert ranks(energy=0.999, elbow=True) == [expected[p] for p in by_path]
    assert max(ranks(energy=0.999, max_rank=4)) == 4
    low = flora.quantize(params, {".*/kernel": flora.Format("int8")})
    assert flora.spectral_ranks(plan, low, energy=0.98)["head/kernel"].adapter.rank == 3
    with pytest.raises(PlanError, match="reads the spectrum"):
        flora.spectral_ranks(flora.plan(params, {".*": flora.LoRA(rank=2)}), params)


@pytest.mark.parametrize(
    ("adapter", "shape", "message"),
    [
        (flora.SVFit(rank=5), (6, 4), "kernel: rank=5 is outside 1..4"),
        (flora.SVFit(rank=-1), (6, 4), "rank=-1"),
        (flora.SoKA(rank=0), (6, 4), "kernel: rank=0 is outside 1..4 of a 6x4 weight in 2x2"),
        (flora.SoKA(rank=2), (7, 5), "rank=2 is outside 1..1 of a 7x5 weight in 1x1 blocks"),
        (flora.SoKA(factor=0), (6, 4), "factor=0"),
        (flora.SoKA(rank=2, dropout=1.0), (6, 4), "dropout=1.0"),
    ],
)
def test_messages(adapter, shape, message):
    with pytest.raises(PlanError, match=message):
        flora.plan({"kernel": jnp.ones(shape)}, {"kernel": adapter})
