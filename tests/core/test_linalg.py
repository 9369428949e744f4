import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import PlanError
from flora_jax.core.linalg import product_svd, randomized_svd, svd


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def falling(m, n, rate):
    u, v = jnp.linalg.qr(r(m, m))[0], jnp.linalg.qr(r(n, n, seed=1))[0]
    k = min(m, n)
    return (u[:, :k] * rate ** jnp.arange(k)) @ v[:, :k].T


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (2, 3, 6, 4)])
def test_full_svd_has_positive_tops(shape):
    m = r(*shape)
    u, s, vt = found = svd(m)
    np.testing.assert_allclose(found.dense(), m, atol=1e-5)
    top = np.take_along_axis(np.asarray(u), np.abs(u).argmax(-2, keepdims=True), -2)
    assert (top > 0).all()
    eye = np.eye(s.shape[-1])
    np.testing.assert_allclose(
        np.swapaxes(u, -1, -2) @ u, np.broadcast_to(eye, u.shape[:-2] + eye.shape), atol=1e-5
    )
    a, b = found.split()
    np.testing.assert_allclose(a @ b, m, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=-2), jnp.linalg.norm(b, axis=-1), atol=1e-5)


def test_randomised_is_near_the_best_of_its_rank():
    """Eckart-Young: no rank-r matrix is nearer than the r leading triplets."""
    m = falling(60, 40, 0.8)
    best = svd(m)
    for rank in (1, 6):
        found = randomized_svd(m, rank, jax.random.key(0))
        floor = jnp.linalg.norm(best.s[rank:])
        assert jnp.linalg.norm(m - found.dense()) <= 1.001 * floor
        np.testing.assert_allclose(found.s, best.s[:rank], rtol=1e-3)
        np.testing.assert_allclose(jnp.abs(jnp.sum(found.u * best.u[:, :rank], 0)), 1, atol=1e-3)
    again = randomized_svd(m, 6, jax.random.key(0))
    np.testing.assert_array_equal(again.u, found.u)


def test_randomised_is_exact_at_the_true_rank_and_on_stacks():
    m = r(3, 20, 4) @ r(3, 4, 15)
    found = jax.jit(lambda m: randomized_svd(m, 4, jax.random.key(1)))(m)
    np.testing.assert_allclose(found.dense(), m, atol=1e-4)
    one = randomized_svd(m[1], 4, jax.random.key(1))
    np.testing.assert_allclose(one.dense(), found.dense()[1], atol=1e-4)
    with pytest.raises(PlanError, match="rank=16 is outside 1..15"):
        randomized_svd(m, 16, jax.random.key(0))


@pytest.mark.parametrize(("m", "rank", "n"), [(20, 3, 15), (6, 10, 5), (4, 4, 9)])
def test_svd_of_a_product_needs_no_product(m, rank, n):
    a, b = r(2, m, rank), r(2, rank, n)
    found, best = product_svd(a, b), svd(a @ b)
    k = min(m, rank, n)
    assert found.s.shape == (2, k)
    np.testing.assert_allclose(found.s, best.s[:, :k], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.dense(), a @ b, atol=1e-4)
