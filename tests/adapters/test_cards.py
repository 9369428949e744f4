"""The closed-form checks and parameter counts of the method cards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters import nola
from flora_jax.core import ops
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.spec import KernelSpec
from flora_jax.core.tucker import expand


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def shapes(**kernels):
    return {k: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for k, s in kernels.items()}


def delta(params, adapters, plan):
    merged = flora.materialize(flora.bind(params, adapters, plan))
    return merged["kernel"] - params["kernel"]


def one(adapter, kernel, specs=()):
    params = {"kernel": kernel}
    plan = flora.plan(params, {"kernel": adapter}, specs=specs)
    return params, plan, flora.init(plan, jax.random.key(1), params)


# Published counts -------------------------------------------------------------------------------
LLAMA_3B = {  # Llama-3.2-3B: 28 scanned layers
    "layers": {
        "q_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 3072), jnp.float32)},
        "k_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 1024), jnp.float32)},
        "v_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 1024), jnp.float32)},
        "down_proj": {"kernel": jax.ShapeDtypeStruct((28, 8192, 3072), jnp.float32)},
    }
}
QV = "layers/(q|v)_proj/kernel"


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        ({QV: flora.LoRA(rank=32)}, 9_175_040),
        ({QV: flora.DoRA(rank=32)}, 9_289_728),
        ({QV: flora.VeRA(rank=256)}, 129_024),
        (
            {
                "layers/(k|v)_proj/kernel": flora.IA3(),
                "layers/down_proj/kernel": flora.IA3(scale="input"),
            },
            286_720,
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "",
)
def test_counts_of_the_peft_benchmark(rules, count):
    assert flora.plan(LLAMA_3B, rules).count == count


@pytest.mark.parametrize(
    ("params", "adapter", "count"),
    [
        (shapes(d=(768, 768)), flora.FLoRA(ranks=(8, 8)), 12_352),
        (shapes(c=(3, 3, 64, 128)), flora.FLoRA(ranks=(2, 2, 16, 16)), 4_108),
        (shapes(c=(3, 3, 64, 128)), flora.FLoRA(ranks=16), 4_108),
        (shapes(c=(1, 1, 64, 128)), flora.FLoRA(ranks=16), 64 * 16 + 128 * 16 + 256),
        ({"layers": shapes(q=(24, 1024, 1024), v=(24, 1024, 1024))}, flora.NOLA(), 49_152),
        (
            {"layers": shapes(fc2=(12, 3072, 768))},
            flora.Hydra(rank_parallel=4, rank_sequential=8),
            331_776,
        ),
        (
            {"layers": shapes(fc2=(12, 3072, 768), proj=(12, 768, 768))},
            flora.Hydra(rank_parallel=2, rank_sequential=2, use_bias=True),
            239_712,
        ),
    ],
)
def test_counts_of_the_cards(params, adapter, count):
    assert flora.plan(params, {".*": adapter}).count == count


# FLoRA ------------------------------------------------------------------------------------------
def test_flora_only_the_core_moves_first():
    params, plan, adapters = one(flora.FLoRA(ranks=2), r(6, 5))
    loss = lambda a: jnp.sum(ops.dot(r(4, 6), flora.bind(params, a, plan)["kernel"]) ** 2)
    grads = jax.grad(loss)(adapters)["kernel"]
    assert np.abs(grads["core"]).max() > 0
    assert all((grads[name] == 0).all() for name in ("a0", "a1"))


def test_flora_full_ranks_reach_any_update_and_identity_core_is_lora():
    kernel, target = r(3, 3, 4, 5), r(3, 3, 4, 5, seed=1)
    params, plan, _ = one(flora.FLoRA(ranks=(3, 3, 4, 5), scale=2.0), kernel)
    eyes = {f"a{n}": jnp.eye(size) for n, size in enumerate(kernel.shape)}
    exact = {"kernel": {"core": target / 2.0, **eyes}}
    np.testing.assert_allclose(delta(params, exact, plan), target, atol=1e-5)

    params, plan, _ = one(flora.FLoRA(ranks=2, scale=0.5), r(6, 4))
    a, b = r(6, 2), r(4, 2)
    got = delta(params, {"kernel": {"core": jnp.eye(2), "a0": a, "a1": b}}, plan)
    np.testing.assert_allclose(got, 0.5 * a @ b.T, atol=1e-5)


def test_flora_hosvd_of_its_own_ranks_is_exact():
    factors = [r(n, j) for n, j in zip((3, 3, 6, 5), (2, 1, 3, 2))]
    target = expand(r(2, 1, 3, 2), factors)
    found = []
    for axis in range(4):
        unfolded = np.moveaxis(np.asarray(target), axis, 0).reshape(target.shape[axis], -1)
        found.append(np.linalg.svd(unfolded)[0][:, : factors[axis].shape[1]])
    core = expand(target, [jnp.asarray(f.T) for f in found])
    np.testing.assert_allclose(expand(core, [jnp.asarray(f) for f in found]), target, atol=1e-4)


def test_flora_convolution_is_the_official_mode_product():
    kernel = r(3, 3, 4, 6)
    params, plan, adapters = one(flora.FLoRA(ranks=(2, 2, 3, 2), scale=4.0), kernel)
    a = {n: r(*v.shape, seed=5) for n, v in adapters["kernel"].items()}
    expected = 4.0 * jnp.einsum(
        "abcd,ha,wb,ic,od->hwio", a["core"], a["a0"], a["a1"], a["a2"], a["a3"]
    )
    np.testing.assert_allclose(delta(params, {"kernel": a}, plan), expected, atol=1e-4)


def test_flora_init_variance():
    _, _, adapters = one(flora.FLoRA(ranks=(50, 2)), jnp.zeros((2000, 3000)))
    for name, j in (("a0", 50), ("a1", 2)):
        assert np.std(adapters["kernel"][name]) == pytest.approx((2 * j) ** -0.5, rel=0.03)


# NOLA -------------------------------------------------------------------------------------------
def test_nola_vjp_equals_autodiff_through_the_basis():
    key = jax.random.key_data(jax.random.key(3))
    c, g = r(10), r(4, 3)
    whole = nola.basis(key, 0, 10, (4, 3)) / np.sqrt(10)
    plain = lambda c: jnp.tensordot(c, whole, 1)
    for chunk in (1, 3, 4, 10):
        chunked = lambda c, n=chunk: nola.combine(c, key, (4, 3), n)
        np.testing.assert_allclose(chunked(c), plain(c), atol=1e-5)
        got = jax.vjp(chunked, c)[1](g)[0]
        np.testing.assert_allclose(got, jax.vjp(plain, c)[1](g)[0], atol=1e-5)
    assert np.abs(whole * np.sqrt(10)).max() <= 1.0


def test_nola_seed_matters_after_training_only():
    outputs = []
    for seed in (0, 1):
        params, plan, adapters = one(flora.NOLA(rank=2, k=5, l=5, seed=seed), r(6, 4))
        run = lambda a, p=params, q=plan: ops.dot(r(3, 6), flora.bind(p, a, q)["kernel"])
        moved = jax.tree.map(jnp.ones_like, adapters)
        outputs.append((run(adapters), run(moved)))
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    assert np.abs(outputs[0][1] - outputs[1][1]).max() > 1e-2


def test_nola_with_enough_elements_spans_every_factor():
    key = jax.random.key_data(jax.random.key(0))
    basis = np.asarray(nola.basis(key, 0, 14, (6, 2))).reshape(14, 12)
    assert np.linalg.matrix_rank(basis) == 12


def test_nola_vit_form_is_not_the_identity():
    params, plan, adapters = one(flora.NOLA(rank=2, k=4, l=4, variant="vit"), r(6, 4))
    assert adapters["kernel"]["alpha"].tolist() == [0.25] * 4
    assert np.abs(delta(params, adapters, plan)).max() > 1e-3


# Hydra ------------------------------------------------------------------------------------------
def test_hydra_merges_the_bias_too():
    params = {"kernel": r(6, 4), "bias": r(4)}
    adapter = flora.Hydra(rank_parallel=2, rank_sequential=3, scale=0.7, use_bias=True)
    plan = flora.plan(params, {"kernel": adapter})
    a = flora.init(plan, jax.random.key(0), params)
    a = {"kernel": {n: r(*v.shape, seed=3) for n, v in a["kernel"].items()}}
    p, x = a["kernel"], r(5, 6)
    f0 = x @ params["kernel"] + params["bias"]
    parallel = (x @ p["parallel_a"] + p["parallel_bias"]) @ p["parallel_b"] + p["parallel_c"]
    sequential = (f0 @ p["sequential_a"] + p["sequential_bias"]) @ p["sequential_b"]
    expected = f0 + 0.7 * (parallel + sequential + p["sequential_c"])
    bound = flora.bind(params, a, plan)
    np.testing.assert_allclose(ops.dot(x, bound["kernel"]) + bound["bias"], expected, atol=1e-4)
    merged = flora.materialize(bound)
    np.testing.assert_allclose(x @ merged["kernel"] + merged["bias"], expected, atol=1e-4)


def test_hydra_sequential_keeps_the_input_space_and_its_gradient_is_closed():
    w0 = r(6, 2) @ r(2, 4)
    params, plan, adapters = one(flora.Hydra(rank_parallel=0, rank_sequential=2), w0)
    moved = jax.tree.map(lambda v: v + r(*v.shape, seed=9), adapters)
    merged = w0 + delta(params, moved, plan)
    assert np.linalg.matrix_rank(np.concatenate([w0, merged], axis=1), tol=1e-3) == 2
    x, target = r(5, 6), r(5, 4)
    loss = lambda a: (
        0.5 * jnp.sum((ops.dot(x, flora.bind(params, a, plan)["kernel"]) - target) ** 2)
    )
    grad = jax.grad(loss)(adapters)["kernel"]["sequential_b"]
    f0 = x @ w0
    expected = (f0 @ adapters["kernel"]["sequential_a"]).T @ (f0 - target)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def test_hydra_needs_the_bias_it_merges_into():
    params, plan, adapters = one(
        flora.Hydra(rank_parallel=2, use_bias=True, rank_sequential=0), r(6, 4)
    )
    with pytest.raises(StructureError, match="the layer has none"):
        flora.bind(params, adapters, plan)


# LoRA and its kin -------------------------------------------------------------------------------
def test_lora_gradient_of_a_is_zero_at_init_and_scales():
    params, plan, adapters = one(flora.LoRA(rank=2, alpha=6), r(6, 4))
    loss = lambda a: jnp.sum(ops.dot(r(3, 6), flora.bind(params, a, plan)["kernel"]) ** 2)
    grads = jax.grad(loss)(adapters)["kernel"]
    assert (grads["a"] == 0).all() and np.abs(grads["b"]).max() > 0
    assert flora.LoRA(rank=16, alpha=8).scale == 0.5
    assert flora.LoRA(rank=16, alpha=8, rslora=True).scale == 2.0
    assert flora.LoRA(rank=1, rslora=True).scale == flora.LoRA(rank=1).scale
    bound = 1 / np.sqrt(6)
    assert np.abs(adapters["kernel"]["a"]).max() <= bound


@pytest.mark.parametrize("rslora", [True, False])
def test_rslora_output_scale_does_not_depend_on_the_rank(rslora):
    sizes = {}
    for rank in (4, 256):
        params, plan, adapters = one(flora.LoRA(rank=rank, rslora=rslora), jnp.zeros((256, 256)))
        adapters["kernel"]["b"] = r(rank, 256)
        sizes[rank] = np.std(ops.dot(r(64, 256), flora.bind(params, adapters, plan)["kernel"]))
    ratio = sizes[256] / sizes[4]
    assert (0.5 < ratio < 2.0) == rslora


def test_lora_on_an_embedding_starts_from_the_other_side():
    params = {"embedding": r(10, 4)}
    plan = flora.plan(params, {"embedding": flora.LoRA(rank=2)})
    a = flora.init(plan, jax.random.key(0), params)["embedding"]
    assert (a["a"] == 0).all() and np.std(a["b"]) > 0.3


def test_dora_norm_and_detached_gradient():
    params, plan, adapters = one(flora.DoRA(rank=2, alpha=3), r(6, 4))
    p = {n: v + 0.3 * r(*v.shape, seed=2) for n, v in adapters["kernel"].items()}
    p["norm2"] = adapters["kernel"]["norm2"]
    x, w0 = r(5, 6), params["kernel"]

    def reference(p, detach):
        w = w0 + 1.5 * p["a"] @ p["b"]
        norm = jnp.linalg.norm(w, axis=0)
        norm = jax.lax.stop_gradient(norm) if detach else norm
        return jnp.sum((x @ w * p["m"] / norm) ** 3)

    ours = lambda p: jnp.sum(ops.dot(x, flora.bind(params, {"kernel": p}, plan)["kernel"]) ** 3)
    np.testing.assert_allclose(ours(p), reference(p, True), rtol=1e-5)
    got, kept, full = (
        jax.grad(f)(p) for f in (ours, lambda p: reference(p, True), lambda p: reference(p, False))
    )
    for name in ("a", "b", "m"):
        np.testing.assert_allclose(got[name], kept[name], rtol=1e-3, atol=1e-2)
    assert np.abs(got["a"] - full["a"]).max() > 0.1


def test_dora_survives_a_zero_column():
    params, plan, adapters = one(flora.DoRA(rank=2), r(6, 4).at[:, 1].set(0.0))
    y = ops.dot(r(3, 6), flora.bind(params, adapters, plan)["kernel"])
    assert np.isfinite(y).all() and (y[:, 1] == 0).all()


@pytest.mark.parametrize("method", [flora.PiSSA, flora.OLoRA])
def test_factored_starts(method):
    kernel = r(8, 6)
    params, plan, adapters = one(method(rank=3, alpha=6), kernel)
    a, b = (adapters["kernel"][n] for n in ("a", "b"))
    if method is flora.OLoRA:
        np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    else:
        best = np.linalg.svd(kernel)
        top = (best[0][:, :3] * best[1][:3]) @ best[2][:3]
        np.testing.assert_allclose(2.0 * a @ b, top, atol=1e-4)
    base, lean = flora.rebase(params, adapters, plan)
    assert set(lean["kernel"]) == {"a", "b"}
    np.testing.assert_allclose(base["kernel"], kernel - 2.0 * a @ b, atol=1e-5)
    moved = jax.tree.map(lambda v: v, adapters)
    moved["kernel"] = {**adapters["kernel"], "a": a + 1.0}
    lean["kernel"]["a"] = a + 1.0
    x = r(3, 8)
    full = ops.dot(x, flora.bind(params, moved, plan)["kernel"])
    np.testing.assert_allclose(full, ops.dot(x, flora.bind(base, lean, plan)["kernel"]), atol=1e-4)
    params, plan, adapters = one(method(rank=6, alpha=6), kernel)
    p = adapters["kernel"]
    np.testing.assert_allclose(p["a0"] @ p["b0"], kernel, atol=1e-4)


def test_pissa_residual_quantises_better():
    kernel = r(64, 48) + 3.0 * r(64, 2) @ r(2, 48)
    params, plan, adapters = one(flora.PiSSA(rank=4), kernel)
    base, lean = flora.rebase(params, adapters, plan)
    rules = {"kernel": flora.Format("int4", block=16)}
    error = lambda tree, ad: np.linalg.norm(
        flora.materialize(
            flora.bind(flora.quantize(tree, rules), ad, plan), quantized="dequantize"
        )["kernel"]
        - kernel
    )
    assert error(base, lean) < 0.5 * error(params, adapters)


def test_vera_shares_slices_and_seeds():
    wide = {"a": {"kernel": r(8, 6)}, "b": {"kernel": r(8, 4)}}
    plan = flora.plan(wide, {".*": flora.VeRA(rank=3, stored=True)})
    a = flora.init(plan, jax.random.key(0), wide)
    np.testing.assert_array_equal(a["a/kernel"]["a0"], a["b/kernel"]["a0"])
    np.testing.assert_array_equal(a["a/kernel"]["b0"][:, :4], a["b/kernel"]["b0"])
    drawn = flora.plan(wide, {".*": flora.VeRA(rank=3)})
    lean = flora.init(drawn, jax.random.key(0), wide)
    ones = lambda t: (
        jax.tree.map(lambda v: v, t) | {k: {**v, "b": jnp.ones_like(v["b"])} for k, v in t.items()}
    )
    x = r(2, 8)
    for path in ("a", "b"):
        full = flora.bind(wide, ones(a), plan)[path]["kernel"]
        again = flora.bind(wide, ones(lean), drawn)[path]["kernel"]
        np.testing.assert_allclose(ops.dot(x, full), ops.dot(x, again), atol=1e-5)


def test_ia3_scales_the_bias_of_an_output_only():
    params = {"kernel": r(6, 4), "bias": r(4)}
    for scale, n in (("output", 4), ("input", 6)):
        plan = flora.plan(params, {"kernel": flora.IA3(scale=scale)})
        l = r(n, seed=4)
        bound = flora.bind(params, {"kernel": {"l": l}}, plan)
        x = r(3, 6)
        got = ops.dot(x, bound["kernel"]) + bound["bias"]
        if scale == "output":
            expected = (x @ params["kernel"] + params["bias"]) * l
        else:
            expected = (x * l) @ params["kernel"] + params["bias"]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_replace_with_everything_is_full_fine_tuning():
    params = {"a": {"kernel": r(6, 4), "bias": r(4)}, "norm": {"scale": r(6)}}
    plan = flora.plan(params, {".*": flora.Replace()})
    adapters = flora.init(plan, jax.random.key(0), params)
    assert plan.count == 24 + 4 + 6
    bound = flora.bind(params, adapters, plan)
    jax.tree.map(np.testing.assert_array_equal, bound, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(bound))


# Bad hyper-parameters ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.LoRA(rank=5), "kernel: rank=5 is outside 1..4 of a 6x4 weight"),
        (flora.LoRA(rank=0), "rank=0"),
        (flora.LoRA(dropout=1.0, rank=2), "dropout=1.0"),
        (flora.LoRA(initializer="xavir", rank=2), "initializer='xavir'"),
        (flora.FLoRA(ranks=(2, 5)), "rank 5 of axis 1 is outside 1..4"),
        (flora.FLoRA(ranks=(2, 2, 2)), "for a kernel with 2 axes"),
        (flora.NOLA(rank=2, k=0), "k=0"),
        (flora.Hydra(rank_parallel=0, rank_sequential=0), "both 0"),
        (flora.Hydra(rank_parallel=2, rank_sequential=9), "rank_sequential=9 exceeds 4"),
        (flora.IA3(scale="out"), "scale='out'"),
        (flora.VeRA(rank=0), "rank=0"),
    ],
)
def test_messages(adapter, message):
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        flora.plan({"kernel": r(6, 4)}, {"kernel": adapter})


def test_three_dimensional_attention_projection():
    """FLoRA keeps heads and head size as modes of their own."""
    spec = KernelSpec.einsum("BTD,DNH->BTNH")
    params, plan, _ = one(flora.FLoRA(ranks=(4, 2, 3)), r(12, 3, 5), {"kernel": spec})
    assert plan.count == 12 * 4 + 3 * 2 + 5 * 3 + 4 * 2 * 3
