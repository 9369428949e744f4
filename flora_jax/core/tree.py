"""Pytree arithmetic on parameters: float32 inside, structure compared before any data is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.errors import StructureError


def check_same(*trees: Any) -> None:
    """Raise StructureError unless all trees have the same paths and shapes; names the first."""
    first = {path: jnp.shape(leaf) for path, leaf in paths.flatten(trees[0]).items()}
    for number, tree in enumerate(trees[1:], 1):
        other = {path: jnp.shape(leaf) for path, leaf in paths.flatten(tree).items()}
        if set(first) != set(other):
            odd = sorted(set(first) ^ set(other))[0]
            where = "the first tree only" if odd in first else f"tree {number} only"
            raise StructureError(f"{odd} is in {where}")
        for path, shape in first.items():
            if other[path] != shape:
                raise StructureError(f"{path}: shape {shape} and {other[path]} (tree {number})")


def _arithmetic(f: Callable[..., jax.Array], *trees: Any) -> Any:
    check_same(*trees)

    def one(*leaves):
        dtype = jnp.result_type(leaves[0])
        if not jnp.issubdtype(dtype, jnp.floating):
            return leaves[0]
        wide = jnp.promote_types(dtype, jnp.float32)
        return f(*(jnp.asarray(leaf, wide) for leaf in leaves)).astype(dtype)

    return jax.tree.map(one, *trees)


def add(a: Any, b: Any) -> Any:
    """``a + b`` in a's dtypes."""
    return _arithmetic(jnp.add, a, b)


def sub(a: Any, b: Any) -> Any:
    """``a - b`` in a's dtypes: a task vector."""
    return _arithmetic(jnp.subtract, a, b)


def scale(factor: Any, a: Any) -> Any:
    """``factor * a``."""
    return _arithmetic(lambda x: factor * x, a)


def linear_combination(weights: Sequence[Any], trees: Sequence[Any]) -> Any:
    """``sum_i weights_i trees_i`` in float32, cast back once to the first tree's dtypes.

    >>> linear_combination([0.25, 0.75], [{"w": jnp.ones(2)}, {"w": 5 * jnp.ones(2)}])["w"].tolist()
    [4.0, 4.0]
    """
    if len(weights) != len(trees):
        raise StructureError(f"{len(weights)} weights for {len(trees)} trees")
    return _arithmetic(lambda *xs: sum(w * x for w, x in zip(weights, xs)), *trees)


def dot(a: Any, b: Any) -> jax.Array:
    """``<a, b>`` over all leaves, float32."""
    check_same(a, b)
    products = jax.tree.map(
        lambda x, y: jnp.vdot(x.astype(jnp.float32), y.astype(jnp.float32)), a, b
    )
    return sum(jax.tree.leaves(products), jnp.zeros(()))


def norm(a: Any) -> jax.Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(dot(a, a))


def cast(a: Any, dtype: Any) -> Any:
    """Floating leaves in another dtype, the rest as they are."""
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_float(x) else x, a)


def size(a: Any) -> int:
    """Numbers in all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(a))
