import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.contraction import Conv, Dot
from flora_jax.core.errors import LazyError
from flora_jax.core.operators import Base, Compose, Identity, Inputs, LowRank, Matrix, Sum, delta
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import BlockDiag, Channelwise, Diag, Dropout, Kron, Permute, Sparse
from flora_jax.core.tucker import Tucker

SPEC = KernelSpec.dense()


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


MAPS = {
    "base": lambda: Base(r(12, 8), SPEC),
    "matrix": lambda: Matrix(r(12, 8)),
    "low-rank": lambda: LowRank(r(12, 3), r(3, 8)),
    "diag": lambda: Diag(r(12)),
    "block": lambda: BlockDiag(r(4, 3, 2)),
    "kron": lambda: Kron(r(2, 4, 2), r(2, 3, 4)),
    "sparse": lambda: Sparse(jnp.array([0, 5, 5, 11]), jnp.array([7, 0, 0, 3]), r(4), (12, 8)),
    "permute": lambda: Permute(jax.random.permutation(jax.random.key(0), 12)),
    "identity": lambda: Identity(12),
    "tucker": lambda: Tucker(r(2, 3), (r(12, 2), r(8, 3)), SPEC),
    "sum": lambda: Base(r(12, 8), SPEC) + 2.0 * LowRank(r(12, 3), r(3, 8)) - Matrix(r(12, 8)),
    "compose": lambda: Diag(r(12)) @ Base(r(12, 8), SPEC) @ BlockDiag(r(2, 4, 4)),
    "channelwise": lambda: Compose(Channelwise(Diag(r(12))), Base(r(12, 8), SPEC)),
}


@pytest.mark.parametrize("name", MAPS)
def test_lazy_transpose_and_cost_agree_with_the_matrix(name):
    m = MAPS[name]()
    matrix = np.asarray(m.dense())
    x = r(5, 2, 12)
    np.testing.assert_allclose(m.then(x), x @ matrix, atol=1e-4)
    inputs = Inputs(Dot(SPEC, (12, matrix.shape[1])), x)
    np.testing.assert_allclose(m.apply(inputs), x @ matrix, atol=1e-4)
    y = r(4, matrix.shape[1])
    np.testing.assert_allclose(m.T.then(y), y @ matrix.T, atol=1e-4)
    np.testing.assert_allclose(m.T.T.dense(), matrix, atol=1e-5)
    assert 0 <= m.flops() <= 4 * 2 * 12 * 12 * 3


def test_low_rank_costs_less_than_dense():
    assert LowRank(r(64, 2), r(2, 64)).flops() == 2 * 2 * (64 * 2)
    assert Base(r(64, 64), SPEC).flops() == 2 * 64 * 64


def test_no_silent_dense_fallback_on_a_convolution():
    how = Conv((3, 3, 4, 8), (1, 1), "SAME")
    with pytest.raises(LazyError, match="BlockDiag has no lazy rule"):
        BlockDiag(r(4, 9, 2)).apply(Inputs(how, r(1, 5, 5, 4)))


def test_input_channels_of_a_convolution():
    how = Conv((3, 3, 4, 8), (1, 1), "SAME")
    w, l, x = r(3, 3, 4, 8), r(4), r(1, 5, 5, 4)
    m = Channelwise(Diag(l), 9) @ Base(w, KernelSpec.conv(2))
    expected = how.base(x * l, w)
    np.testing.assert_allclose(m.apply(Inputs(how, x)), expected, atol=1e-5)
    np.testing.assert_allclose(m.dense(), (w * l[:, None]).reshape(36, 8), atol=1e-6)


def test_dropout_has_no_matrix():
    with pytest.raises(LazyError, match="no matrix"):
        Compose(Dropout(0.5, jax.random.key(0)), Identity(3)).dense()


def test_delta_drops_the_plain_base_term():
    base = Base(r(12, 8), SPEC)
    low = LowRank(r(12, 3), r(3, 8))
    assert delta(base + low, base).terms == (low,)
    scaled = delta(base @ Diag(r(8)), base)
    assert isinstance(scaled, Sum)
    np.testing.assert_allclose(scaled.dense(), base.dense() * r(8) - base.dense(), atol=1e-6)
