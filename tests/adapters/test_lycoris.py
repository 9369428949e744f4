"""The closed forms and counts of LoHa and LoKr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters.lokr import factorization
from flora_jax.core import ops
from flora_jax.core.errors import PlanError


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def trained(adapter, kernel):
    """A plan and random adapters, each array of its own."""
    params = {"kernel": kernel}
    plan = flora.plan(params, {"kernel": adapter})
    arrays = flora.init(plan, jax.random.key(1), params)["kernel"]
    moved = {n: r(*a.shape, seed=i) for i, (n, a) in enumerate(sorted(arrays.items()))}
    return params, plan, {"kernel": moved}


def delta(params, adapters, plan):
    merged = flora.materialize(flora.bind(params, adapters, plan))
    return merged["kernel"] - params["kernel"]


LLAMA_3B = {
    "layers": {
        "q_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 3072), jnp.float32)},
        "v_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 1024), jnp.float32)},
    }
}


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (flora.LoHa(rank=32), 18_350_080),
        (flora.LoKr(rank=32, decompose_factor=4), 2_294_656),
    ],
)
def test_counts_of_the_peft_benchmark(adapter, count):
    assert flora.plan(LLAMA_3B, {".*": adapter}).count == count


# LoHa -------------------------------------------------------------------------------------------
def test_loha_is_the_hadamard_product_of_rank_r_squared():
    params, plan, adapters = trained(flora.LoHa(rank=2, alpha=3.0), r(12, 9))
    p = adapters["kernel"]
    expected = 1.5 * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])
    np.testing.assert_allclose(delta(params, adapters, plan), expected, atol=1e-4)
    assert np.linalg.matrix_rank(expected, tol=1e-3) == 4

    def explicit(p):
        w = params["kernel"] + 1.5 * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])
        return jnp.sum(jnp.square(r(5, 12) @ w))

    lazy = lambda p: jnp.sum(
        ops.dot(r(5, 12), flora.bind(params, {"kernel": p}, plan)["kernel"]) ** 2
    )
    got, want = jax.grad(lazy)(p), jax.grad(explicit)(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.05), got, want)


def test_loha_effective_convolution():
    params, plan, adapters = trained(flora.LoHa(rank=2, effective_conv=True), r(3, 2, 5, 6))
    p = adapters["kernel"]
    assert plan.count == 2 * (3 * 2 * 4 + 5 * 2 + 2 * 6)
    half = lambda i: jnp.einsum("hwjk,cj,ko->hwco", p[f"core{i}"], p[f"a{i}"], p[f"b{i}"])
    np.testing.assert_allclose(delta(params, adapters, plan), 4.0 * half(1) * half(2), rtol=1e-3)
    one = flora.plan({"kernel": r(1, 1, 5, 6)}, {"kernel": flora.LoHa(rank=2, effective_conv=True)})
    assert [name for name, _, _ in one["kernel"].train] == ["a1", "a2", "b1", "b2"]


# LoKr -------------------------------------------------------------------------------------------
def test_factorization():
    assert [factorization(n) for n in (1, 12, 36, 127, 256, 360)] == [
        (1, 1), (3, 4), (6, 6), (1, 127), (16, 16), (18, 20)
    ]  # fmt: skip
    assert [factorization(n, 4) for n in (128, 8, 30, 7)] == [(4, 32), (4, 2), (3, 10), (1, 7)]


def test_lokr_is_a_kronecker_product():
    params, plan, adapters = trained(flora.LoKr(rank=6, alpha=3.0), r(12, 20))
    p = adapters["kernel"]
    assert {n: a.shape for n, a in p.items()} == {"w1": (3, 4), "w2": (4, 5)}
    np.testing.assert_allclose(
        delta(params, adapters, plan), 0.5 * jnp.kron(p["w1"], p["w2"]), atol=1e-5
    )
    # The same in torch's orientation, where HF PEFT forms it.
    np.testing.assert_allclose(
        jnp.kron(p["w1"], p["w2"]).T, jnp.kron(p["w1"].T, p["w2"].T), atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"w1": (6, 6), "a2": (6, 2), "b2": (2, 8)}),
        ({"decompose_both": True}, {"a1": (6, 2), "b1": (2, 6), "a2": (6, 2), "b2": (2, 8)}),
        ({"rank": 3, "decompose_both": True}, {"w1": (6, 6), "a2": (6, 3), "b2": (3, 8)}),
        ({"rank": 5}, {"w1": (6, 6), "w2": (6, 8)}),
        ({"decompose_factor": 2}, {"w1": (2, 2), "a2": (18, 2), "b2": (2, 24)}),
    ],
)
def test_lokr_forms(options, shapes):
    """r < max / 2 makes a factor a product; the right one always may be, the left one if asked."""
    adapter = flora.LoKr(**{"rank": 2, "alpha": 4.0, **options})
    params, plan, adapters = trained(adapter, r(36, 48))
    p = adapters["kernel"]
    assert {n: a.shape for n, a in p.items()} == shapes
    w1 = p["w1"] if "w1" in p else p["a1"] @ p["b1"]
    w2 = p["w2"] if "w2" in p else p["a2"] @ p["b2"]
    expected = 4.0 / adapter.rank * jnp.kron(w1, w2)
    np.testing.assert_allclose(delta(params, adapters, plan), expected, atol=1e-4)


@pytest.mark.parametrize("form", ["full", "low-rank", "core"])
def test_lokr_convolutions(form):
    """Channels are (m, p) under each tap: kron of w1 with every tap of w2."""
    rank = 4 if form == "full" else 1
    adapter = flora.LoKr(rank=rank, alpha=rank, effective_conv=form == "core")
    params, plan, adapters = trained(adapter, r(3, 2, 12, 8))
    p = adapters["kernel"]
    if form == "full":
        w2 = p["w2"].reshape(3, 2, 4, 4)
    elif form == "low-rank":
        w2 = (p["a2"] @ p["b2"]).reshape(3, 2, 4, 4)
    else:
        assert p["core2"].shape == (3, 2, 1, 1) and p["a2"].shape == (4, 1)
        w2 = jnp.einsum("hwjk,cj,ko->hwco", p["core2"], p["a2"], p["b2"])
    taps = jnp.array([[jnp.kron(p["w1"], w2[h, w]) for w in range(2)] for h in range(3)])
    np.testing.assert_allclose(delta(params, adapters, plan), taps, atol=1e-4)


def test_lokr_starts():
    """Which factor is zero, and the others' range: U(+-1/sqrt(fan in of the torch tensor))."""
    for options, zero in (
        ({}, "w1"),
        ({"decompose_both": True}, "b1"),
        ({"initializer": "lycoris"}, "a2"),
        ({"initializer": "lycoris", "rank": 9}, "w2"),
    ):
        adapter = flora.LoKr(**{"rank": 2, **options})
        plan = flora.plan({"kernel": r(36, 48)}, {"kernel": adapter})
        arrays = flora.init(plan, jax.random.key(0), {"kernel": r(36, 48)})["kernel"]
        assert [n for n, a in arrays.items() if not np.any(a)] == [zero]
        fans = {"w1": 6, "a1": 6, "b1": 2, "w2": 6, "a2": 6, "b2": 2}
        for name, array in arrays.items():
            if name != zero:
                bound = fans[name] ** -0.5
                assert 0.5 * bound < np.abs(array).max() <= bound, name


# Both -------------------------------------------------------------------------------------------
def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from shapes_in(value.jaxpr)


@pytest.mark.parametrize(
    "adapter",
    [
        flora.LoHa(rank=2),
        flora.LoKr(rank=2, decompose_factor=3),
        flora.LoKr(rank=9),
        flora.SoKA(rank=1),
        flora.SVFit(rank=3),
    ],
    ids=lambda a: type(a).__name__,
)
def test_the_update_is_never_formed(adapter):
    """No array of the kernel's size appears, forward or backward."""
    params, plan, adapters = trained(adapter, r(30, 42))
    kernel, x = params["kernel"], r(3, 30)

    def loss(a):
        return jnp.sum(jnp.square(ops.dot(x, flora.bind({"kernel": kernel}, a, plan)["kernel"])))

    formed = list(shapes_in(jax.make_jaxpr(jax.grad(loss))(adapters).jaxpr))
    assert len(formed) > 5
    assert not [s for s in formed if np.prod(s) >= 30 * 42]
    change = flora.bind(params, adapters, plan)["kernel"].operator().flops() - 2 * 30 * 42
    assert 0 < change < 2 * 30 * 42


@pytest.mark.parametrize("shape", [(36, 36), (12, 60), (60, 12)])
def test_many_kronecker_terms_do_not_form_the_update(shape):
    """With so many terms and rows the matrix would be the cheaper way."""
    params, plan, adapters = trained(flora.SoKA(rank=6), jnp.asarray(r(*shape)))
    x = r(101, shape[0])
    run = lambda a: ops.dot(x, flora.bind(params, a, plan)["kernel"])
    formed = list(shapes_in(jax.make_jaxpr(run)(adapters).jaxpr))
    assert all(np.prod(s) % 101 == 0 for s in formed if np.prod(s) >= np.prod(shape))
    np.testing.assert_allclose(
        run(adapters), x @ (params["kernel"] + delta(params, adapters, plan)), atol=1e-2
    )


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.LoHa(rank=0), "kernel: rank=0"),
        (flora.LoHa(dropout=1.5), "dropout=1.5"),
        (flora.LoKr(rank=0), "rank=0"),
        (flora.LoKr(decompose_factor=0), "decompose_factor=0 must be -1"),
        (flora.LoKr(initializer="torch"), "initializer='torch' is not peft or lycoris"),
    ],
)
def test_messages(adapter, message):
    with pytest.raises(PlanError, match=message):
        flora.plan({"kernel": r(6, 4)}, {"kernel": adapter})


def test_an_embedding_takes_no_dropout():
    with pytest.raises(PlanError, match="embedding: an embedding's branch"):
        flora.plan({"embedding": r(6, 4)}, {"embedding": flora.LoKr(dropout=0.1)})
