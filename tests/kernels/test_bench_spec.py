"""What the kernel benchmark takes from every op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import bench_spec


def test_gradient_of_chosen_arguments():
    f = lambda x, n, y: {"a": x * n, "b": y * y}
    dx, dy = bench_spec.gradient(f, (0, 2))(jnp.ones(3), 4, jnp.full(2, 3.0))
    np.testing.assert_array_equal(dx, 4.0)
    np.testing.assert_array_equal(dy, 6.0)


def test_drawn_arguments_have_the_shapes_and_all_codes():
    args = (jax.ShapeDtypeStruct((64, 64), jnp.int8), {"x": jax.ShapeDtypeStruct((3,), "bfloat16")})
    codes, tree = bench_spec.draw(args, jax.random.key(0))
    assert (codes.min(), codes.max(), codes.dtype) == (-128, 127, jnp.int8)
    assert tree["x"].shape == (3,) and tree["x"].dtype == jnp.bfloat16


@pytest.mark.parametrize("op", bench_spec.ops())
def test_every_case_evaluates_abstractly(op):
    """Names are unique, arguments fit the function and the rivals, the work is not forgotten."""
    for case in bench_spec.cases(op):
        jax.eval_shape(case.function, *case.args)
        for rival in case.rivals.values():
            jax.eval_shape(rival.function, *rival.args)
        assert case.work.flops > 0 and case.work.bytes > 0
        assert bool(case.wrt) == (case.gradient_work is not None)
        if case.wrt:
            jax.eval_shape(case.gradient, *case.args)
            for rival in case.rivals.values():
                gradients = jax.eval_shape(case.rival_gradient(rival), *rival.args)
                assert len(gradients) >= 1


def test_unknown_ops_are_refused():
    with pytest.raises(ConfigError, match="unknown kernel op 'matmul'"):
        bench_spec.cases("matmul")
