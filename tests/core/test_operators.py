import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.change import delta_factors
from flora_jax.core.contraction import Conv, Dot
from flora_jax.core.errors import LazyError
from flora_jax.core.kron import Hadamard, Kron
from flora_jax.core.operators import Base, Compose, Identity, Inputs, LowRank, Matrix, Sum, delta
from flora_jax.core.shards import Fold, Shards
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import (
    BlockDiag,
    Channelwise,
    Diag,
    Dropout,
    Patchwise,
    Permute,
    Sparse,
)
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
    "kron-wide": lambda: Kron(r(2, 6, 2), r(2, 2, 8)),
    "kron-window": lambda: Kron(r(2, 3, 2), r(2, 4, 4), 2),
    "hadamard": lambda: Hadamard(r(12, 2), r(2, 8), r(12, 2, seed=1), r(2, 8, seed=1)),
    "tucker-identity": lambda: Tucker(r(12, 3), (None, r(8, 3)), SPEC),
    "sparse": lambda: Sparse(jnp.array([0, 5, 5, 11]), jnp.array([7, 0, 0, 3]), r(4), (12, 8)),
    "permute": lambda: Permute(jax.random.permutation(jax.random.key(0), 12)),
    "identity": lambda: Identity(12),
    "fold": lambda: Fold(12, 5),
    "fold-runs": lambda: Fold(12, 5, runs=True),
    "fold-even": lambda: Fold(12, 4, runs=True),
    "spread": lambda: Fold(20, 12, spread=True),
    "spread-runs": lambda: Fold(24, 12, runs=True, spread=True),
    "shards": lambda: Shards(r(5, 8), 12),
    "patchwise": lambda: Compose(Patchwise(BlockDiag(r(4, 3, 3))), Base(r(12, 8), SPEC)),
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


LOW = {
    "low-rank": (lambda: LowRank(r(12, 3), r(3, 8)), 3),
    "shards": (lambda: Shards(r(2, 5, 8), 12), 5),
    "mini": (lambda: Shards(r(5, 3), 12) @ Fold(9, 3, spread=True), 3),
    "runs": (lambda: Matrix(r(12, 4)) @ Fold(9, 4, runs=True, spread=True), 4),
    "scaled": (lambda: 2.0 * LowRank(r(12, 3), r(3, 8)), 3),
    "sum": (lambda: LowRank(r(12, 3), r(3, 8)) - LowRank(r(12, 2), r(2, 8)), 5),
    "around": (lambda: Diag(r(12)) @ LowRank(r(12, 3), r(3, 8)) @ BlockDiag(r(2, 4, 4)), 3),
    "lowest": (lambda: LowRank(r(12, 3), r(3, 9)) @ LowRank(r(9, 2), r(2, 8)), 2),
    "waist": (lambda: Diag(r(12)) @ Matrix(r(12, 3)) @ Matrix(r(3, 3)) @ Matrix(r(3, 8)), 3),
    "batched": (lambda: Matrix(r(2, 12, 3)) @ Matrix(r(3, 8)), 3),
    "tucker": (lambda: Tucker(r(2, 3), (r(12, 2), r(8, 3)), SPEC), 2),
    "tucker-out": (lambda: Tucker(r(3, 2), (r(12, 3), r(8, 2)), SPEC).T, 2),
    "tucker-conv": (
        lambda: Tucker(
            r(2, 1, 2, 3), (r(3, 2), r(3, 1), r(4, 2), r(8, 3)), KernelSpec.conv(2, groups=2)
        ),
        3,
    ),
    "tucker-batch": (
        lambda: Tucker(r(2, 2, 2), (r(3, 2), r(12, 2), r(8, 2)), KernelSpec.einsum("EBD,EDF->EBF")),
        2,
    ),
}


@pytest.mark.parametrize("name", LOW)
def test_factors_are_exact(name):
    m, rank = LOW[name][0](), LOW[name][1]
    a, b = m.factors()
    assert a.shape[-1] == b.shape[-2] == rank
    np.testing.assert_allclose(a @ b, m.dense(), atol=1e-4)
    assert a.shape[:-2] == b.shape[:-2] == m.dense().shape[:-2]
    ta, tb = m.T.factors()
    np.testing.assert_allclose(ta @ tb, np.swapaxes(m.dense(), -1, -2), atol=1e-4)


def test_full_rank_maps_have_no_factors():
    assert all(MAPS[name]().factors() is None for name in ("base", "matrix", "diag", "compose"))
    assert (Base(r(12, 8), SPEC) + LowRank(r(12, 3), r(3, 8))).factors() is None


def test_factors_of_a_change():
    """A sum with the base, and the base between maps that are the identity and something low."""
    base, conv = Base(r(12, 8), SPEC), Base(r(3, 3, 4, 8), KernelSpec.conv(2))
    near = lambda n, seed: Identity(n) + LowRank(r(n, 2, seed=seed), r(2, n, seed=seed))
    low = LowRank(r(12, 3), r(3, 8))
    cases = [
        (base + low, base, 3),
        (near(12, 0) @ base, base, 2),
        (base @ near(8, 0) @ near(8, 1), base, 4),
        (near(12, 1) @ (base + low) @ near(8, 2) + 0.5 * low, base, 10),
        (Channelwise(near(4, 3), 9) @ conv, conv, 18),
    ]
    for expression, of, rank in cases:
        a, b = delta_factors(expression, of)
        assert a.shape[-1] == rank
        np.testing.assert_allclose(a @ b, expression.dense() - of.dense(), atol=3e-4)
    for expression in (base @ Diag(r(8)), 2.0 * base + low, low, base + Matrix(r(12, 8))):
        assert delta_factors(expression, base) is None


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


@pytest.mark.parametrize("groups", [1, 2])
def test_patches_and_shards_of_a_convolution(groups):
    """A map of whole patches, and shard sums with and without folded channels."""
    how = Conv((3, 3, 4, 8), (2, 1), "SAME", groups=groups)
    spec = KernelSpec.conv(2, groups=groups)
    batch = (2,) if groups > 1 else ()
    x, base = r(1, 5, 6, 4 * groups), Base(r(3, 3, 4, 8), spec)
    n_out = 8 // groups
    maps = [Patchwise(BlockDiag(r(*batch, 9, 4, 4))) @ base]
    maps += [Shards(r(*batch, size, n_out), 36) for size in (2, 5)]
    for m in maps:
        matrix = m.dense()
        kernel = spec.restore(matrix, (3, 3, 4, 8))
        y = how.leave(m.apply(Inputs(how, x)))
        np.testing.assert_allclose(y, how.base(x, kernel), atol=1e-4)


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
