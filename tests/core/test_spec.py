import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from flora_jax.core.errors import PlanError
from flora_jax.core.spec import KernelSpec, infer


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_restore_inverts_canonical(data):
    ndim = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.integers(1, 4)) for _ in range(ndim))
    order = data.draw(st.permutations(range(ndim)))
    cut = sorted(data.draw(st.tuples(st.integers(0, ndim - 2), st.integers(1, ndim - 1))))
    if cut[0] == cut[1]:
        cut[1] += 1
    batch, n_in, n_out = order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]
    spec = KernelSpec(
        kind="einsum", batch_axes=tuple(batch), in_axes=tuple(n_in), out_axes=tuple(n_out)
    )
    kernel = np.arange(np.prod(shape)).reshape(shape)
    matrix = spec.canonical(jnp.asarray(kernel))
    assert matrix.shape == spec.canonical_shape(shape)
    np.testing.assert_array_equal(spec.restore(matrix, shape), kernel)
    assert KernelSpec.from_json(spec.to_json()) == spec


def test_grouped_convolution_keeps_groups_as_batch():
    spec = KernelSpec.conv(2, groups=2)
    kernel = jnp.arange(3 * 3 * 4 * 6.0).reshape(3, 3, 4, 6)
    matrix = spec.canonical(kernel)
    assert matrix.shape == (2, 36, 3)
    np.testing.assert_array_equal(matrix[1, 0], kernel[0, 0, 0, 3:])
    np.testing.assert_array_equal(spec.restore(matrix, kernel.shape), kernel)


@pytest.mark.parametrize(
    ("equation", "batch", "n_in", "n_out"),
    [
        ("BTD,NDH->BTNH", (), (1,), (0, 2)),
        ("BTNH,NHD->BTD", (), (0, 1), (2,)),
        ("EBD,EDF->EBF", (0,), (1,), (2,)),
        ("...D,DF->...F", (), (0,), (1,)),
    ],
)
def test_einsum_axes(equation, batch, n_in, n_out):
    spec = KernelSpec.einsum(equation)
    assert (spec.batch_axes, spec.in_axes, spec.out_axes) == (batch, n_in, n_out)


@pytest.mark.parametrize("equation", ["BTD->BT", "BD,DDF->BF", "BD,...F->BF", "BD,DFZ->BF"])
def test_bad_einsum(equation):
    with pytest.raises(PlanError):
        KernelSpec.einsum(equation)


@pytest.mark.parametrize(
    ("path", "shape", "kind", "stack"),
    [
        ("attn/kernel", (4, 8), "dense", 0),
        ("layers/attn/kernel", (3, 4, 8), "dense", 1),
        ("layers_0/attn/kernel", (4, 8), "dense", 0),
        ("layers/2/attn/kernel", (4, 8), "dense", 0),
        ("conv/kernel", (3, 3, 4, 8), "conv", 0),
        ("embed/embedding", (10, 4), "embedding", 0),
        ("layers/norm/scale", (3, 4), "vector", 1),
        ("norm/bias", (4,), "vector", 0),
    ],
)
def test_infer(path, shape, kind, stack):
    spec = infer(path, shape)
    assert (spec.kind, spec.stack_ndim) == (kind, stack)


def test_infer_refuses_what_the_name_does_not_tell():
    with pytest.raises(PlanError, match="specs="):
        infer("query/kernel", (4, 2, 8))
