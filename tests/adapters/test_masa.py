"""MASA: Matrix PCA, both forms of the coefficients, groups, whitened corrections, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.adapters import masa
from flora_jax.core.errors import PlanError
from flora_jax.training.sharding import adapter_spec

LAYERS = 6


def stack(layers=LAYERS, n_in=7, n_out=5, seed=0):
    return jax.random.normal(jax.random.key(seed), (layers, n_in, n_out))


def merged(adapter, kernel, **options):
    params = {"layers": {"kernel": kernel}}
    plan = flora.plan(params, {".*": adapter})
    adapters = flora.init(plan, jax.random.key(1), params, **options)
    bound = flora.materialize(flora.bind(params, adapters, plan))
    return plan, adapters, bound["layers"]["kernel"]


def test_the_cards_count():
    kernels = {
        name: {"kernel": jax.ShapeDtypeStruct((12, 768, 768), jnp.float32)} for name in "qkvo"
    }
    plan = flora.plan({"layers": kernels}, {".*": flora.MASA(atoms=4)})
    assert plan.count == 9_437_376 and 4 * 12 * 768 * 768 == 28_311_552


def test_pca_is_the_eigenvectors_of_the_gram_matrix():
    """Error = sum of discarded eigenvalues, orthonormal atoms, monotone, 0 at S = L."""
    kernel = stack()
    rows = np.asarray(kernel, np.float64).reshape(LAYERS, -1)
    values = np.linalg.eigvalsh(rows @ rows.T)[::-1]
    errors = []
    for atoms in range(1, LAYERS + 1):
        plan, adapters, found = merged(flora.MASA(atoms=atoms, start="pca"), kernel)
        d = np.asarray(adapters["layers/kernel"]["atoms"], np.float64).reshape(atoms, -1)
        c = np.asarray(adapters["layers/kernel"]["coefficients"])
        np.testing.assert_allclose(d @ d.T, np.eye(atoms), atol=1e-4)
        np.testing.assert_allclose(c, rows @ d.T, atol=1e-4)
        errors.append(float(np.sum((np.asarray(found) - kernel) ** 2)))
        np.testing.assert_allclose(errors[-1], values[atoms:].sum(), rtol=1e-4, atol=1e-8)
        assert plan.count == atoms * 35 + LAYERS * atoms
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9


def test_pca_of_dependent_layers_is_still_exact():
    kernel = jnp.concatenate([stack(3), stack(3)])
    _, _, found = merged(flora.MASA(atoms=6, start="pca"), kernel)
    np.testing.assert_allclose(found, kernel, atol=1e-5)


def test_one_hot_coefficients_are_a_plain_transformer():
    kernel = stack()
    params = {"layers": {"kernel": kernel}}
    plan = flora.plan(params, {".*": flora.MASA(atoms=LAYERS)})
    adapters = {"layers/kernel": {"atoms": stack(seed=3), "coefficients": jnp.eye(LAYERS)}}
    bound = flora.bind(params, adapters, plan)
    np.testing.assert_array_equal(bound["layers"]["kernel"], stack(seed=3))


@pytest.mark.parametrize("coefficients", ["direct", "mlp"])
@pytest.mark.parametrize("start", ["scaled", "depth"])
def test_random_starts(start, coefficients):
    kernel = 0.05 * stack(layers=8, n_in=40, n_out=40)
    adapter = flora.MASA(atoms=4, start=start, coefficients=coefficients)
    _, adapters, found = merged(adapter, kernel)
    c = np.asarray(masa.mixing(adapters["layers/kernel"]))
    if start == "depth":
        np.testing.assert_array_equal(c.argmax(1), [0, 0, 1, 1, 2, 2, 3, 3])
        np.testing.assert_allclose(found.std(), kernel.std(), rtol=0.1)
    else:
        # E sum_s c^2 = S is one draw of a chi-squared with 32 degrees of freedom.
        np.testing.assert_allclose(found.std(), kernel.std() * np.sqrt((c**2).mean()), rtol=0.1)
        assert 0.5 < (c**2).mean() < 1.6


def test_the_mlp_can_be_dropped_bit_for_bit():
    kernel = stack()
    params = {"layers": {"kernel": kernel}}
    adapter = flora.MASA(atoms=3, start="pca", coefficients="mlp")
    plan = flora.plan(params, {".*": adapter})
    adapters = flora.init(plan, jax.random.key(1), params)
    _, _, direct = merged(flora.MASA(atoms=3, start="pca"), kernel)
    # Trained: every array moved.
    key = jax.random.key(5)
    adapters = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(key, a.shape), adapters)
    x = stack(1, 4, 7)[0]

    def run(plan):
        def f(adapters):
            body = lambda y, w: (y, x @ w["kernel"])
            return jax.lax.scan(body, 0.0, flora.bind(params, adapters, plan)["layers"])[1]

        return jax.jit(f)

    fixed, kept = masa.fix_coefficients(plan, adapters)
    np.testing.assert_array_equal(run(plan)(adapters), run(fixed)(kept))
    assert fixed.count == 3 * 35 + 3 * LAYERS and set(kept["layers/kernel"]) == {
        "atoms",
        "coefficients",
    }
    assert fixed["layers/kernel"].adapter.coefficients == "direct"
    assert direct.shape == kernel.shape


def test_gradients_of_atoms_sum_over_the_layers():
    kernel, g = stack(), stack(seed=8)
    params = {"layers": {"kernel": kernel}}
    plan = flora.plan(params, {".*": flora.MASA(atoms=2)})
    adapters = flora.init(plan, jax.random.key(1), params)
    loss = lambda a: jnp.sum(g * flora.bind(params, a, plan)["layers"]["kernel"])
    grads = jax.grad(loss)(adapters)["layers/kernel"]
    own = adapters["layers/kernel"]
    np.testing.assert_allclose(
        grads["atoms"], jnp.einsum("ls,lio->sio", own["coefficients"], g), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        grads["coefficients"], jnp.einsum("sio,lio->ls", own["atoms"], g), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_mixes_in_float32():
    kernel = stack().astype(jnp.bfloat16)
    _, adapters, found = merged(flora.MASA(atoms=LAYERS, start="pca"), kernel)
    assert found.dtype == jnp.bfloat16
    assert {a.dtype for a in adapters["layers/kernel"].values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(found, kernel)


def test_groups_have_atoms_of_their_own():
    kernel = stack()
    plan, adapters, found = merged(flora.MASA(atoms=(1, 2), cuts=(2,), start="pca"), kernel)
    for part, atoms in ((slice(0, 2), 1), (slice(2, 6), 2)):
        d, c = masa.matrix_pca(kernel[part], atoms)
        np.testing.assert_allclose(found[part], jnp.tensordot(c, d, 1), atol=1e-5)
    assert adapters["layers/kernel"]["atoms"].shape == (3, 7, 5)
    # A change of the second group's atoms leaves the first group's layers alone.
    own = adapters["layers/kernel"]
    other = {"layers/kernel": {**own, "atoms": own["atoms"].at[1:].add(1.0)}}
    params = {"layers": {"kernel": kernel}}
    moved = flora.bind(params, other, plan)["layers"]["kernel"]
    changed = np.abs(moved - found).max((1, 2)) > 0
    np.testing.assert_array_equal(changed, [False, False, True, True, True, True])


def test_cuts_are_where_consecutive_layers_differ():
    p = jnp.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.8, 0.2]])
    kl = masa.layer_divergences(jnp.log(p) + 3.0)
    expected = [np.sum(a * np.log(a / b)) for a, b in zip(np.asarray(p), np.asarray(p)[1:])]
    np.testing.assert_allclose(kl, expected, atol=1e-6)
    assert masa.group_layers(kl, 2) == (2,) and masa.group_layers(kl, 1) == ()
    assert masa.group_layers(kl, 4) == (1, 2, 3)
    with pytest.raises(PlanError, match="groups=5 is outside 1..4"):
        masa.group_layers(kl, 5)


def test_whitened_correction_is_the_best_of_its_rank_for_the_inputs():
    """The inputs' error is that of the discarded singular values of L^T R; plain SVD does worse."""
    kernel = stack()
    x = jax.random.normal(jax.random.key(4), (LAYERS, 50, 7)) * jnp.logspace(0, -2, 7)
    gram = jnp.einsum("lni,lnj->lij", x, x)
    stats = {"layers/kernel": {"gram": gram}}
    plan, adapters, found = merged(flora.MASA(atoms=2, rank=2, start="pca"), kernel, stats=stats)
    assert plan.count == 2 * 35 + 2 * LAYERS + LAYERS * 2 * 12
    _, _, without = merged(flora.MASA(atoms=2, start="pca"), kernel)
    for n in range(LAYERS):
        residual = np.asarray(kernel[n] - without[n], np.float64)
        g = np.asarray(gram[n], np.float64)
        lower = np.linalg.cholesky(g)
        s = np.linalg.svd(lower.T @ residual, compute_uv=False)
        left = np.asarray(kernel[n] - found[n], np.float64)
        error = np.trace(left.T @ g @ left)
        np.testing.assert_allclose(error, (s[2:] ** 2).sum(), rtol=2e-3)
        u, s, vt = np.linalg.svd(residual)
        plain = residual - (u[:, :2] * s[:2]) @ vt[:2]
        assert error < np.trace(plain.T @ g @ plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"atoms": 7}, r"atoms=7 is outside 1..6, the layers 0..5"),
        ({"atoms": 2, "cuts": (5,)}, r"atoms=2 is outside 1..1, the layers 5..5"),
        ({"cuts": (4, 2)}, r"cuts=\(4, 2\) must rise inside 1..5"),
        ({"start": "pcs"}, "unknown start 'pcs'; nearest: pca"),
        ({"coefficients": "mpl"}, "unknown coefficients 'mpl'; nearest: mlp"),
        ({"coefficients": "mlp", "hidden": 4}, "hidden=4 must be at least the 6 layers"),
        ({"rank": 9}, "rank=9 does not fit a"),
    ],
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(PlanError, match=f"^layers/kernel: {message}"):
        flora.plan({"layers": {"kernel": stack()}}, {".*": flora.MASA(**fields)})


def test_shardings_follow_the_kernel():
    params = {"layers": {"kernel": stack()}}
    entry = flora.plan(params, {".*": flora.MASA(atoms=2, rank=1)})["layers/kernel"]
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert adapter_spec(entry, "atoms", (2, 7, 5), spec) == spec
    assert tuple(adapter_spec(entry, "u", (6, 7, 1), spec)) == (None, "fsdp", None)
    assert tuple(adapter_spec(entry, "v", (6, 1, 5), spec)) == (None, None, "tensor")
    assert tuple(adapter_spec(entry, "coefficients", (6, 2), spec)) == (None, None)
