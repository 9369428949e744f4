"""Bottleneck and Compacter: the closed forms and counts of their cards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters.compacter import FactoredKron
from flora_jax.core import ops
from flora_jax.core.errors import PlanError
from flora_jax.core.kron import Kron


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 7 * len(shape) + sum(shape)), shape)


def t5_base():
    """The weights of T5-base that the card's counts speak of: 12+12 layers, 62 layer norms."""
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    block = lambda norms: {
        "self_attn": {"o": {"kernel": s(12, 768, 768)}},
        "mlp": {"wo": {"kernel": s(12, 3072, 768)}},
        **{f"norm_{i}": {"scale": s(12, 768)} for i in range(norms)},
    }
    stack = lambda norms: {"layers": block(norms), "final_norm": {"scale": s(768)}}
    return {"encoder": stack(2), "decoder": stack(3)}


@pytest.mark.parametrize(
    ("where", "count"),
    [("mlp/wo", 104_704), ("(mlp/wo|self_attn/o)", 161_728)],
    ids=["compacter++", "compacter"],
)
def test_counts_of_t5_base(where, count):
    rules = {f".*/{where}/kernel": flora.Compacter(), ".*/scale": flora.Replace()}
    plan = flora.plan(t5_base(), rules)
    assert plan.count == count
    assert {e.count // 12 for e in plan if e.path.endswith("kernel")} == {2376}
    (pool,) = plan.pools
    assert pool.train == (("a", (4, 4, 4), "float32"),)
    assert pool.path in plan.table() and f"{count:,} trained" in plan.table()
    norms = sum(e.count for e in plan if e.path.endswith("scale"))
    assert norms == 62 * 768


def test_unshared_and_unfactored_counts():
    params = {"kernel": jax.ShapeDtypeStruct((3072, 768), jnp.float32)}
    count = lambda adapter: flora.plan(params, {".*": adapter}).count
    biases, dense = 24 + 768, 2 * 768 * 24
    assert count(flora.Compacter(shared=False)) == 2376 + 2 * 64
    assert count(flora.Compacter(factorized=False, shared=False)) == dense // 4 + biases + 2 * 64
    assert count(flora.Compacter(rank=3)) == 2376 + 2 * 2 * 792 + 64
    assert count(flora.Bottleneck(reduction=32)) == dense + biases
    assert count(flora.Bottleneck(reduction=32)) / 2376 > 15


def test_the_fast_path_is_the_sum_of_kronecker_products():
    a, s, t, y = r(3, 2, 4), r(3, 5, 2), r(3, 2, 6), r(7, 10)
    explicit = sum(np.kron(a[i], s[i] @ t[i]) for i in range(3))
    product = FactoredKron(a, s, t)
    np.testing.assert_allclose(product.dense(), explicit, atol=1e-5)
    np.testing.assert_allclose(product.then(y), y @ explicit, atol=1e-4)
    np.testing.assert_allclose(product.T.dense(), explicit.T, atol=1e-5)
    np.testing.assert_allclose(Kron(a, s @ t).then(y), y @ explicit, atol=1e-4)
    built = jax.make_jaxpr(product.then)(y)
    biggest = max(v.aval.size for eqn in built.eqns for v in eqn.outvars)
    assert biggest < explicit.size * 7, "neither the matrix nor a row of matrices is built"


def test_kronecker_rank_is_at_most_n():
    n, wide, narrow = 3, 4, 2
    adapter = flora.Compacter(n=n, bottleneck=n * narrow, phm_init="uniform")
    params = {"kernel": jnp.zeros((5, n * wide))}
    plan = flora.plan(params, {".*": adapter})
    tree = flora.init(plan, jax.random.key(0), params)
    matrix = adapter.projection(tree["kernel"], tree["pool/Compacter"], "down").dense()
    blocks = np.asarray(matrix).reshape(n, wide, n, narrow).transpose(0, 2, 1, 3)
    values = np.linalg.svd(blocks.reshape(n * n, wide * narrow), compute_uv=False)
    assert (values[:n] > 1e-2).all() and (values[n:] < 1e-5).all()
    assert np.linalg.matrix_rank(matrix) == n * narrow, "yet of full matrix rank"


def test_n_of_one_is_a_dense_adapter_up_to_a_scalar():
    adapter = flora.Compacter(n=1, bottleneck=3, factorized=False, activation="relu")
    params, y = {"kernel": r(5, 8)}, r(6, 5)
    plan = flora.plan(params, {".*": adapter})
    tree = flora.init(plan, jax.random.key(0), params)
    tree["pool/Compacter"] = {"a": jnp.full((1, 1, 1), 2.0)}
    got = ops.dot(y, flora.bind(params, tree, plan)["kernel"])
    own = tree["kernel"]
    dense = flora.Bottleneck(bottleneck=3, activation="relu")
    same = {"down": 2 * own["down_b"][0], "up": 2 * own["up_b"][0]}
    same |= {name: own[name] for name in ("down_bias", "up_bias")}
    plan = flora.plan(params, {".*": dense})
    want = ops.dot(y, flora.bind(params, {"kernel": same}, plan)["kernel"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_shared_matrices_get_the_sum_of_the_gradients():
    """The gradient of the pool == the sum over adapters and projections with an A of their own."""
    params = {"layers": {"kernel": r(2, 8, 8)}, "head": {"kernel": r(8, 8)}}
    rules = {".*/kernel": flora.Compacter(n=2, bottleneck=4)}
    own = {".*/kernel": flora.Compacter(n=2, bottleneck=4, shared=False)}
    plan, plans = flora.plan(params, rules), flora.plan(params, own)
    tree = flora.init(plan, jax.random.key(0), params)
    tree = jax.tree.map(lambda a: a + 0.3 * r(*a.shape), tree)
    a = tree["pool/Compacter"]["a"]
    apart = {path: dict(tree[path]) for path in ("layers/kernel", "head/kernel")}
    for path, lead in (("layers/kernel", (2,)), ("head/kernel", ())):
        for name in ("a_down", "a_up"):
            apart[path][name] = jnp.broadcast_to(a, (*lead, *a.shape))

    def loss(adapters, plan):
        bound = flora.bind(params, adapters, plan)
        body = lambda x, layer: (jnp.tanh(ops.dot(x, layer["kernel"])), None)
        x, _ = jax.lax.scan(body, r(3, 8), bound["layers"])
        return jnp.sum(ops.dot(x, bound["head"]["kernel"]) ** 2)

    one, many = jax.grad(loss)(tree, plan), jax.grad(loss)(apart, plans)
    total = sum(
        many[path][name].reshape(-1, 2, 2, 2).sum(0)
        for path in ("layers/kernel", "head/kernel")
        for name in ("a_down", "a_up")
    )
    np.testing.assert_allclose(one["pool/Compacter"]["a"], total, rtol=1e-4)


def test_starts():
    params = {"kernel": jnp.zeros((4, 768))}
    compacter = flora.Compacter()
    plan = flora.plan(params, {".*": compacter})
    tree = flora.init(plan, jax.random.key(0), params)
    assert 0.7e-4 < np.std(tree["pool/Compacter"]["a"]) < 1.3e-4
    bound = np.sqrt(2) * np.sqrt(6 / (768 // 4 + 1))
    s = np.abs(tree["kernel"]["down_s"]).max()
    assert 0.95 * bound < s <= bound
    h = r(5, 768)
    change = compacter.branch(tree["kernel"], h, tree["pool/Compacter"])
    assert 0 < np.linalg.norm(change) < 1e-3 * np.linalg.norm(h)

    uniform = flora.plan(params, {".*": flora.Compacter(phm_init="uniform")})
    a = np.abs(flora.init(uniform, jax.random.key(0), params)["pool/Compacter"]["a"])
    assert 0.8 < a.max() <= 1

    houlsby = flora.plan(params, {".*": flora.Bottleneck(bottleneck=64)})
    own = flora.init(houlsby, jax.random.key(0), params)["kernel"]
    assert np.abs(own["down"]).max() <= 2e-3 and 0.8e-3 < np.std(own["down"]) < 0.95e-3
    change = houlsby["kernel"].adapter.branch(own, h, None)
    assert 0 < np.linalg.norm(change) < 1e-3 * np.linalg.norm(h)


def test_the_adapter_sees_the_layers_bias_in_a_stack():
    params = {"layers": {"kernel": r(3, 6, 8), "bias": r(3, 8)}}
    adapter = flora.Bottleneck(bottleneck=2)
    plan = flora.plan(params, {".*/kernel": adapter})
    tree = jax.tree.map(lambda a: a + 0.3, flora.init(plan, jax.random.key(0), params))
    bound, x = flora.bind(params, tree, plan), r(4, 6)

    def body(_, layer):
        return None, ops.dot(x, layer["kernel"]) + layer["bias"]

    _, got = jax.lax.scan(body, None, bound["layers"])
    for i in range(3):
        h = x @ params["layers"]["kernel"][i] + params["layers"]["bias"][i]
        own = jax.tree.map(lambda a, i=i: a[i], tree["layers/kernel"])
        np.testing.assert_allclose(got[i], h + adapter.branch(own, h, None), atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.Compacter(n=3, bottleneck=6), "n=3 does not divide.* nearest that does: n=2"),
        (flora.Compacter(n=4, bottleneck=2), "n=4 does not divide"),
        (flora.Compacter(n=2, bottleneck=4, rank=0), "rank=0"),
        (flora.Compacter(n=2, bottleneck=4, phm_init="random"), "normal or uniform"),
        (flora.Bottleneck(reduction=32), "reduction=32 leaves no bottleneck for 8 outputs"),
        (flora.Bottleneck(bottleneck=0), "bottleneck=0 leaves no bottleneck"),
        (flora.Bottleneck(bottleneck=2, activation="gelu_old"), "nearest: gelu"),
    ],
)
def test_bad_settings(adapter, message):
    with pytest.raises(PlanError, match=f"^kernel: .*{message}"):
        flora.plan({"kernel": jnp.zeros((12, 8))}, {".*": adapter})


def test_a_bias_that_is_not_one_number_per_output():
    params = {"kernel": jnp.zeros((12, 2, 4)), "bias": jnp.zeros(4)}
    specs = {"kernel": flora.KernelSpec.dense(1, 2)}
    plan = flora.plan(params, {"kernel": flora.Bottleneck(bottleneck=2)}, specs=specs)
    with pytest.raises(PlanError, match=r"^kernel: a bias of shape \(4,\) for 8 outputs"):
        flora.bind(params, flora.init(plan, jax.random.key(0), params), plan)
