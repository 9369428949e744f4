"""KORE: the checks of its method card, on calibrated statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters import kore
from flora_jax.core import ops
from flora_jax.core.errors import FloraError, PlanError, StructureError
from flora_jax.core.spec import KernelSpec


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def run(p, x):
    return ops.dot(x, p["kernel"])


def started(adapter, kernel, batches):
    params = {"kernel": kernel}
    plan = flora.plan(params, {"kernel": adapter})
    stats = flora.calibrate(run, params, plan, batches)
    return params, plan, stats, flora.init(plan, jax.random.key(0), params, stats=stats)


def test_streaming_equals_one_shot():
    x = r(30, 12)
    kernel = r(12, 7)
    _, _, whole, one = started(flora.KORE(rank=3), kernel, [x])
    _, _, parts, many = started(flora.KORE(rank=3), kernel, [x[:4], x[4:8], x[8:30]])
    np.testing.assert_allclose(whole["kernel"]["gram"], x.T @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(whole["kernel"]["gram"], parts["kernel"]["gram"], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, many)


def test_old_inputs_do_not_see_any_b_where_they_leave_room():
    x = r(40, 8) @ r(8, 12)  # rank 8 = in - r
    params, plan, stats, adapters = started(flora.KORE(rank=4), r(12, 9), [x])
    assert float(kore.captured_energy(stats["kernel"]["gram"], 4)) < 1e-6
    before = run(params, x)
    loss = lambda a: jnp.sum((run(flora.bind(params, a, plan), r(20, 12, seed=3)) - 1.0) ** 2)

    @jax.jit
    def step(a):
        g = jax.grad(loss)(a)["kernel"]["b"]
        return {"kernel": {**a["kernel"], "b": a["kernel"]["b"] - 1e-3 * g}}

    moved = adapters
    for _ in range(100):
        moved = step(moved)
    assert float(loss(moved)) < 0.9 * float(loss(adapters))
    for b in (moved["kernel"]["b"], 3.0 * r(4, 9, seed=5)):
        after = run(flora.bind(params, {"kernel": {**adapters["kernel"], "b": b}}, plan), x)
        scale = np.abs(before).max()
        np.testing.assert_allclose(after / scale, before / scale, atol=1e-4)


def test_bound_on_what_full_rank_inputs_see():
    x = r(200, 12) * jnp.logspace(-1, 1, 12)
    for rank in (2, 5):
        _, _, stats, adapters = started(flora.KORE(rank=rank), r(12, 9), [x])
        c, a0 = np.asarray(stats["kernel"]["gram"]), np.asarray(adapters["kernel"]["a0"])
        values = np.linalg.eigvalsh(c)
        assert np.linalg.norm(a0.T @ c) <= 1.001 * values[rank - 1] * np.linalg.norm(a0)
        energy = kore.captured_energy(stats["kernel"]["gram"], rank)
        assert energy == pytest.approx(values[:rank].sum() / values.sum(), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_full_rank_start_is_the_weight(scale):
    kernel = r(6, 9)
    _, _, _, adapters = started(flora.KORE(rank=6, scale=scale), kernel, [r(20, 6)])
    a0, b0 = adapters["kernel"]["a0"], adapters["kernel"]["b0"]
    np.testing.assert_allclose(scale * a0 @ b0, kernel, atol=1e-5)


@pytest.mark.parametrize("inner, rank", [(2, 3), (5, 3), (5, 5)])
def test_rank_of_the_projected_weight_and_the_construction_from_its_svd(inner, rank):
    kernel = r(8, inner) @ r(inner, 7)
    _, _, stats, adapters = started(flora.KORE(rank=rank), kernel, [r(30, 8)])
    a0, b0 = (np.asarray(adapters["kernel"][n], np.float64) for n in ("a0", "b0"))
    assert np.linalg.matrix_rank(a0 @ b0, tol=1e-4) == min(rank, inner)
    null = np.linalg.eigh(np.asarray(stats["kernel"]["gram"], np.float64))[1][:, :rank]
    left, s, right = np.linalg.svd(null @ null.T @ np.asarray(kernel, np.float64))
    np.testing.assert_allclose(a0 @ b0, (left[:, :rank] * s[:rank]) @ right[:rank], atol=1e-4)
    np.testing.assert_allclose(a0.T @ a0, np.diag(s[:rank]), atol=1e-3)
    np.testing.assert_allclose(b0 @ b0.T, np.diag(s[:rank]), atol=1e-3)


def test_rebase_is_the_papers_form():
    kernel = r(8, 6)
    for train_a in (False, True):
        adapter = flora.KORE(rank=2, scale=0.5, train_a=train_a)
        params, plan, _, adapters = started(adapter, kernel, [r(30, 8)])
        moved = {n: v + 0.1 if n in "ab" else v for n, v in adapters["kernel"].items()}
        base, lean = flora.rebase(params, {"kernel": moved}, plan)
        assert set(lean["kernel"]) == ({"a", "b"} if train_a else {"a0", "b"})
        x = r(3, 8)
        full = run(flora.bind(params, {"kernel": moved}, plan), x)
        np.testing.assert_allclose(full, run(flora.bind(base, lean, plan), x), atol=1e-4)
        np.testing.assert_allclose(
            base["kernel"], kernel - 0.5 * moved["a0"] @ moved["b0"], atol=1e-5
        )


def test_convolution_protects_its_patches():
    """Images of rank-deficient patches: a convolution's outputs on them stay."""
    w = r(3, 3, 4, 8)
    x = jnp.repeat(r(2, 6, 6, 1), 4, axis=-1)  # equal channels: patches span 9 of 36 dimensions
    params = {"kernel": w}
    plan = flora.plan(params, {"kernel": flora.KORE(rank=5)})
    conv = lambda p, x: ops.conv(x, p["kernel"])
    stats = flora.calibrate(conv, params, plan, [x])
    adapters = flora.init(plan, jax.random.key(0), params, stats=stats)
    moved = {"kernel": {**adapters["kernel"], "b": r(5, 8)}}
    bound = flora.bind(params, moved, plan)
    np.testing.assert_allclose(conv(bound, x), conv(params, x), atol=1e-3)
    assert np.abs(conv(bound, r(2, 6, 6, 4)) - conv(params, r(2, 6, 6, 4))).max() > 0.1


@pytest.mark.parametrize("rank, millions", [(235, 340), (256, 369)])
def test_counts_of_the_paper(rank, millions):
    """LLaVA-1.5-7B: every linear of the language model, and the projector whole (inferred)."""
    sizes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    sizes |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    shaped = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"layers": {name: {"kernel": shaped(32, *s)} for name, s in sizes.items()}}
    params["projector"] = {
        "0": {"kernel": shaped(1024, 4096), "bias": shaped(4096)},
        "2": {"kernel": shaped(4096, 4096), "bias": shaped(4096)},
    }
    rules = {"layers/.*": flora.KORE(rank=rank), "projector/.*": flora.Replace()}
    assert flora.plan(params, rules).count // 10**6 == millions


def test_hars_of_the_paper():
    assert flora.adapters.kore.hars(35.96, 40.00, 7.12, 46.74) == pytest.approx(82.80, abs=0.005)
    assert kore.hars(7.12, 46.74, 7.12, 46.74) == 0.0
    with pytest.raises(PlanError, match="must be positive"):
        kore.hars(1.0, 1.0, 0.0, 1.0)


def test_bad_requests():
    params = {"kernel": r(6, 4)}
    plan = flora.plan(params, {"kernel": flora.KORE(rank=2)})
    with pytest.raises(PlanError, match="kernel: KORE starts from the weight's inputs and needs"):
        flora.init(plan, jax.random.key(0), params)
    wrong = {"kernel": {"gram": jnp.eye(5)}}
    with pytest.raises(StructureError, match=r"kernel: the statistic gram has shape \(5, 5\)"):
        flora.init(plan, jax.random.key(0), params, stats=wrong)
    with pytest.raises(FloraError, match="got no batches"):
        flora.calibrate(run, params, plan, [])
    for bad in (flora.KORE(rank=5), flora.KORE(rank=2, scale=0.0), flora.KORE(rank=2, dropout=1.0)):
        with pytest.raises(PlanError, match="^kernel: "):
            flora.plan(params, {"kernel": bad})


# Calibration ------------------------------------------------------------------------------------
def test_only_declared_statistics_and_shared_inputs():
    params = {n: {"kernel": r(6, 6, seed=i)} for i, n in enumerate(("q", "k", "o", "free"))}
    calls = []

    def attention(p, x):
        calls.append(1)
        q, k = (ops.dot(x, p[n]["kernel"]) for n in "qk")
        return ops.dot(jnp.tanh(q * k), p["o"]["kernel"])

    rules = {"(q|k|o)/kernel": flora.KORE(rank=2), "free/kernel": flora.LoRA(rank=2)}
    plan = flora.plan(params, rules)
    batches = [r(5, 6, seed=i) for i in range(3)]
    stats = flora.calibrate(attention, params, plan, iter(batches))
    assert {p: set(s) for p, s in stats.items()} == dict.fromkeys(
        ("q/kernel", "k/kernel", "o/kernel"), {"gram"}
    )
    assert stats["q/kernel"]["gram"] is stats["k/kernel"]["gram"]
    assert len(calls) == 2, "one trace to find equal inputs, one to take statistics"
    x = jnp.concatenate(batches)
    np.testing.assert_allclose(stats["k/kernel"]["gram"], x.T @ x, rtol=1e-5, atol=1e-4)
    z = jnp.tanh((x @ params["q"]["kernel"]) * (x @ params["k"]["kernel"]))
    np.testing.assert_allclose(stats["o/kernel"]["gram"], z.T @ z, rtol=1e-4, atol=1e-4)
    nothing = flora.plan(params, {"free/kernel": flora.LoRA(rank=2)})
    assert flora.calibrate(attention, params, nothing, iter([])) == {}


def test_layouts_come_from_the_plan():
    equation = "EBD,EDF->EBF"
    params = {"experts": r(2, 6, 4)}
    specs = {"experts": KernelSpec.einsum(equation)}
    plan = flora.plan(params, {"experts": flora.KORE(rank=2)}, specs=specs)
    x = r(2, 5, 6)
    run = lambda p, x: ops.einsum(equation, x, p["experts"])
    stats = flora.calibrate(run, params, plan, [x])["experts"]
    np.testing.assert_allclose(stats["gram"], jnp.einsum("ebi,ebj->eij", x, x), rtol=1e-5)
