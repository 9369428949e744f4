"""Inside ``jax.shard_map``: arrays that differ from device to device and arrays that do not.

jax follows both through its own primitives. A ``custom_vjp`` and the start values of a loop must
agree by hand: a gradient by an array that all devices share is a sum over devices.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def together(*trees: Any) -> Any:
    """All arrays marked to vary over every manual axis that one of them varies over.

    Call it on the arguments of a ``custom_vjp``: where an argument is shared, its gradient is then
    summed over the devices. Outside of ``shard_map`` nothing happens.

    >>> together(jax.numpy.ones(2), {"w": jax.numpy.ones(3)})[1]["w"].shape
    (3,)
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(trees)))

    def one(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, trees)


def like(start: jax.Array, *trees: Any) -> jax.Array:
    """A loop's start value, varying as the arrays that the loop reads."""
    return together(start, *trees)[0]


def results(types: Any, *trees: Any) -> Any:
    """``types``, results of a Pallas kernel, varying over every manual axis that one of its
    arguments ``trees`` varies over: inside of ``shard_map`` a kernel must say so.

    >>> results(jax.ShapeDtypeStruct((2,), "float32"), jax.numpy.ones(3)).shape
    (2,)
    """
    leaves = jax.tree.leaves(together(*trees))
    if not _axes(leaves[0]):
        return types
    axes = jax.typeof(leaves[0]).manual_axis_type
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes), types
    )


def _axes(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
