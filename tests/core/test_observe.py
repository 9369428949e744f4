import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.errors import FloraError, PlanError, RuleError
from flora_jax.core.spec import KernelSpec
from flora_jax.linen.layers import Dense

X = [np.random.default_rng(i).normal(size=(4, 3, 6)).astype(np.float32) for i in range(3)]


def rows(batches):
    return np.concatenate([b.reshape(-1, b.shape[-1]) for b in batches])


def test_closed_forms_over_batches():
    params = {"kernel": jnp.ones((6, 5))}
    stats = flora.observe(lambda p, x: ops.dot(x, p["kernel"]), params, ["kernel"], X)["kernel"]
    x = rows(X)
    np.testing.assert_allclose(stats["gram"], x.T @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(stats["sum"], x.sum(0), atol=1e-4)
    np.testing.assert_allclose(stats["abs_sum"], np.abs(x).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(stats["max"], np.abs(x).max(0))
    assert stats["count"] == len(x)


def test_masked_rows_do_not_count():
    params = {"kernel": jnp.ones((6, 5))}
    batches = [(x, np.random.default_rng(9).integers(0, 2, x.shape[:2])) for x in X]
    stats = flora.observe(
        lambda p, b: ops.dot(b[0], p["kernel"]), params, ["kernel"], batches, mask=lambda b: b[1]
    )["kernel"]
    keep = np.concatenate([m.reshape(-1) for _, m in batches]).astype(bool)
    x = rows(X)[keep]
    np.testing.assert_allclose(stats["gram"], x.T @ x, rtol=1e-5, atol=1e-4)
    assert stats["count"] == keep.sum()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(Dense(6, name="kernel_layer")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="layers")(x, None)[0]


def test_scan_and_remat_equal_the_explicit_loop():
    model = Scanned()
    params = model.init(jax.random.key(0), X[0])["params"]
    apply = lambda p, x: model.apply({"params": p}, x)
    stats = flora.observe(apply, params, ["layers/.*/kernel"], X, statistics=("gram", "max"))
    (got,) = stats.values()
    layer = params["layers"]["kernel_layer"]
    z, expected, top = X, [], []
    for i in range(4):
        expected.append(rows(z).T @ rows(z))
        top.append(np.abs(rows(z)).max(0))
        z = [np.tanh(b @ layer["kernel"][i] + layer["bias"][i]) for b in z]
    np.testing.assert_allclose(got["gram"], np.stack(expected), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got["max"], np.stack(top), rtol=1e-5)


def test_convolution_rows_are_patches_in_kernel_order():
    w = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))
    x = jax.random.normal(jax.random.key(1), (2, 6, 7, 4))
    conv = lambda p, x: ops.conv(x, p["kernel"], strides=2)
    stats = flora.observe(conv, {"kernel": w}, ["kernel"], [x], statistics=("gram", "sum"))
    stats = stats["kernel"]
    y = conv({"kernel": w}, x)
    flat = w.reshape(24, 5)
    np.testing.assert_allclose(stats["sum"] @ flat, y.sum((0, 1, 2)), rtol=1e-3, atol=1e-3)
    energy = np.einsum("bhwo,bhwp->op", y, y)
    np.testing.assert_allclose(flat.T @ stats["gram"] @ flat, energy, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "how",
    [
        {"groups": 2},
        {"groups": 2, "strides": 2, "padding": "VALID"},
        {"transpose": True, "strides": 2},
        {"transpose": True, "strides": (3, 1), "padding": "VALID"},
        {"transpose": True, "strides": 2, "rhs_dilation": 2},
        {"transpose": True, "strides": 2, "padding": ((1, 1), (0, 2))},
    ],
    ids=str,
)
def test_grouped_and_transposed_convolutions(how):
    """sum and gram of the rows give the sum and the energy of the outputs, group by group."""
    groups = how.get("groups", 1)
    w = jax.random.normal(jax.random.key(0), (3, 2, 4, 6))
    x = jax.random.normal(jax.random.key(1), (2, 6, 7, 4 * groups))
    spec = KernelSpec.conv(2, groups=groups, transpose=how.get("transpose", False))
    run = lambda p, x: ops.conv(x, p["kernel"], **how)
    found = flora.observe(
        run, {"kernel": w}, ["kernel"], [x], statistics=("gram", "sum"), specs={"kernel": spec}
    )["kernel"]
    y = run({"kernel": w}, x).reshape(-1, groups, 6 // groups)
    flat = spec.canonical(w).reshape(groups, 24, 6 // groups)
    sums = jnp.einsum("gi,gio->go", found["sum"].reshape(groups, 24), flat)
    np.testing.assert_allclose(sums, y.sum(0), rtol=1e-3, atol=1e-3)
    gram = found["gram"].reshape(groups, 24, 24)
    energy = jnp.einsum("gio,gij,gjp->gop", flat, gram, flat)
    np.testing.assert_allclose(energy, jnp.einsum("ngo,ngp->gop", y, y), rtol=1e-3, atol=1e-2)


def test_one_mask_fits_rows_of_more_and_of_fewer_axes():
    keep = jnp.array([[1, 0, 1], [0, 0, 0]])
    params = {"kernel": jnp.ones((6, 5)), "head": {"kernel": jnp.ones((5, 2))}}

    def run(p, x):
        return ops.dot(ops.dot(x, p["kernel"]).mean(1), p["head"]["kernel"])

    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    count = lambda mask, x=x: {
        path: int(found["count"])
        for path, found in flora.observe(
            run, params, [".*"], [x], statistics=("count",), mask=lambda _: mask
        ).items()
    }
    assert count(keep) == {"kernel": 2, "head/kernel": 1}
    assert count(jnp.array([0, 1])) == {"kernel": 3, "head/kernel": 1}
    with pytest.raises(PlanError, match=r"kernel: a mask of shape \(4,\) for rows"):
        count(jnp.ones(4))


def test_embedding_counts_and_expert_batches():
    ids = jnp.array([[0, 2, 2], [2, 1, 0]])
    table = {"embedding": jnp.ones((4, 3))}
    stats = flora.observe(
        lambda p, i: ops.embed(i, p["embedding"]), table, [".*"], [ids], statistics=("sum",)
    )
    np.testing.assert_array_equal(stats["embedding"]["sum"], [2, 1, 3, 0])
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    experts = {"kernel": jnp.ones((2, 3, 4))}
    equation = "EBD,EDF->EBF"
    stats = flora.observe(
        lambda p, x: ops.einsum(equation, x, p["kernel"]),
        experts,
        ["kernel"],
        [x],
        statistics=("gram",),
        specs={"kernel": KernelSpec.einsum(equation)},
    )
    expected = np.einsum("ebi,ebj->eij", x, x)
    np.testing.assert_allclose(stats["kernel"]["gram"], expected, rtol=1e-5, atol=1e-5)


def test_on_a_mesh_of_one_axis():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X[0], NamedSharding(mesh, P("data")))
    params = {"kernel": jnp.ones((6, 5))}
    stats = flora.observe(lambda p, x: ops.dot(x, p["kernel"]), params, ["kernel"], [x])["kernel"]
    np.testing.assert_allclose(stats["gram"], rows(X[:1]).T @ rows(X[:1]), rtol=1e-5, atol=1e-4)


def test_bad_requests():
    params = {"kernel": jnp.ones((6, 6)), "unused": {"kernel": jnp.ones((6, 6))}}
    once = lambda p, x: ops.dot(x, p["kernel"])
    twice = lambda p, x: ops.dot(ops.dot(x, p["kernel"]), p["kernel"])
    with pytest.raises(FloraError, match="unknown statistic 'grams'; nearest: gram"):
        flora.observe(once, params, ["kernel"], X, statistics=("grams",))
    with pytest.raises(FloraError, match="unused/kernel: the model never contracted"):
        flora.observe(once, params, ["unused/kernel"], X)
    with pytest.raises(FloraError, match="used 2 times"):
        flora.observe(twice, params, ["kernel"], X)
    with pytest.raises(RuleError, match="matches nothing"):
        flora.observe(once, params, ["kernle"], X)
    with pytest.raises(FloraError, match="no batches"):
        flora.observe(once, params, ["kernel"], [])
    both = flora.observe(twice, params, ["kernel"], X, statistics=("count",))
    assert both["kernel"]["count"] == 2 * 36
