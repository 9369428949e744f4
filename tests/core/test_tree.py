import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core import tree
from flora_jax.core.errors import StructureError

A = {"a": {"w": jnp.array([1.0, 2.0])}, "n": jnp.array([3])}
B = {"a": {"w": jnp.array([0.5, -1.0])}, "n": jnp.array([4])}


def test_arithmetic():
    np.testing.assert_array_equal(tree.add(A, B)["a"]["w"], [1.5, 1.0])
    np.testing.assert_array_equal(tree.sub(A, B)["a"]["w"], [0.5, 3.0])
    np.testing.assert_array_equal(tree.scale(2.0, A)["a"]["w"], [2.0, 4.0])
    np.testing.assert_array_equal(tree.add(A, B)["n"], [3])  # integers are not parameters
    assert tree.dot(A["a"], B["a"]) == 0.5 - 2.0
    assert tree.norm(A["a"]) == pytest.approx(5**0.5)
    assert tree.size(A) == 3


def test_bfloat16_is_summed_in_float32():
    small = {"w": jnp.full(4, 2.0**-9, jnp.bfloat16)}
    one = {"w": jnp.ones(4, jnp.bfloat16)}
    total = tree.linear_combination([1.0] * 5, [one, small, small, small, small])
    assert total["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(total["w"].astype(np.float32), 1 + 2.0**-7)


def test_structure_is_compared_first():
    with pytest.raises(StructureError, match="a/w: shape"):
        tree.add(A, {"a": {"w": jnp.ones(3)}, "n": jnp.array([4])})
    with pytest.raises(StructureError, match="b is in tree 1 only"):
        tree.add({"a": 1.0}, {"a": 1.0, "b": 2.0})
    with pytest.raises(StructureError, match="2 weights for 1"):
        tree.linear_combination([1, 2], [A])
