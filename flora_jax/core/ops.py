"""The one dispatch: every multiplication by a weight goes through these functions.

Each takes a plain array or a weight leaf (``QArray``, ``Adapted``, ``Observed``) and returns what
the plain array would give. Output dtype is the activation's; sums run in float32 or better.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import contraction, paths
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import Prefix, Weight, WeightLeaf, attend, contract, is_leaf
from flora_jax.core.spec import KernelSpec

__all__ = [
    "attend",
    "conv",
    "dot",
    "einsum",
    "embed",
    "logical_shape",
    "prefix",
    "prefix_start",
    "value",
    "virtual_rows",
]


def logical_shape(w: Weight) -> tuple[int, ...]:
    """The shape of the kernel that ``w`` stands for."""
    return tuple(w.shape)


def dot(
    x: jax.Array, w: Weight, *, in_axes: int = 1, out_axes: int | None = None, precision: Any = None
) -> jax.Array:
    """``x [..., *in] . w [*in, *out] -> [..., *out]``.

    Args:
      in_axes: how many trailing axes of x (leading axes of w) are contracted.
      out_axes: the remaining axes of w; given by its rank.

    Raises:
      PlanError: the contracted sizes differ.

    >>> dot(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    shape = logical_shape(w)
    if x.shape[x.ndim - in_axes :] != shape[:in_axes]:
        raise PlanError(f"input {x.shape} does not fit a kernel {shape} over {in_axes} axes")
    spec = KernelSpec.dense(in_axes, len(shape) - in_axes if out_axes is None else out_axes)
    return contract(contraction.Dot(spec, shape, precision), x, w)


def einsum(equation: str, x: jax.Array, w: Weight, *, precision: Any = None) -> jax.Array:
    """``jnp.einsum(equation, x, w)`` for any weight, e.g. ``"BTD,DNH->BTNH"``."""
    return contract(contraction.Einsum(equation, logical_shape(w), precision), x, w)


def conv(
    x: jax.Array,
    w: Weight,
    *,
    strides: Any = 1,
    padding: Any = "SAME",
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    groups: int = 1,
    transpose: bool = False,
    precision: Any = None,
) -> jax.Array:
    """Channels-last convolution ``x [N, *space, I]``, ``w [*window, I/groups, O]``.

    ``transpose`` gives ``lax.conv_transpose`` (its kernel is ``[*window, I, O]`` as well).
    """
    shape = logical_shape(w)
    window = len(shape) - 2
    how = contraction.Conv(
        shape,
        contraction.check_conv(strides, window, "strides"),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        None
        if lhs_dilation is None
        else contraction.check_conv(lhs_dilation, window, "lhs_dilation"),
        None
        if rhs_dilation is None
        else contraction.check_conv(rhs_dilation, window, "rhs_dilation"),
        groups,
        transpose,
        precision,
    )
    return contract(how, x, w)


def embed(ids: jax.Array, w: Weight, *, dtype: Any = None) -> jax.Array:
    """Rows ``w[ids]`` of an embedding table ``[vocabulary, features]``."""
    return contract(contraction.Lookup(logical_shape(w), dtype or w.dtype), ids, w)


def prefix(w: Weight) -> tuple[Weight, Prefix | None]:
    """A key or value kernel without its attention prefix, and the prefix (None without one).

    The attention puts the entries before its keys (not rotated) or values; every query sees them.
    """
    return w.prefix() if isinstance(w, WeightLeaf) else (w, None)


def prefix_start(params: Any) -> Any:
    """Where positions start in a model: the length of its attention prefixes, 0 without.

    Args:
      params: the bound parameters (also stacked ones).

    Returns:
      An int; ``[N, 1]`` where the rows of the batch differ.

    Raises:
      PlanError: its layers have prefixes of different lengths.
    """
    start = 0
    for path, leaf in paths.flatten(params, is_leaf=is_leaf).items():
        found = leaf.prefix_tokens() if is_leaf(leaf) else None
        if found is None:
            continue
        if not isinstance(found, int):
            return found[:, None]
        if start not in (0, found):
            raise PlanError(f"{path}: a prefix of {found} tokens, another weight has {start}")
        start = found
    return start


def virtual_rows(params: Any) -> tuple[tuple[int, ...], Any] | None:
    """The ids of a model's trained prompt, to stand before the tokens; None without one.

    Args:
      params: the bound parameters.

    Returns:
      ``(ids, on)``: ids past the end of the embedding table, and ``on [N]``, which rows of the
      batch have a prompt, None for all.

    Raises:
      PlanError: two tables have one, or its rows have prompts of different lengths.
    """
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for path, leaf in paths.flatten(params, is_leaf=is_leaf).items():
        rows = leaf.virtual_rows() if is_leaf(leaf) else None
        if rows is not None:
            size = leaf.shape[0]
            found[path] = tuple(range(size, size + rows[0])), rows[1]
    if len(found) > 1:
        raise PlanError(f"two tables have a prompt: {' and '.join(found)}")
    return next(iter(found.values()), None)


def value(w: Weight, dtype: Any = None) -> jax.Array:
    """A leaf that is not contracted (bias, norm scale, position table) as a plain array.

    Raises:
      PlanError: the leaf is a weight leaf, which only a contraction can use lazily.
    """
    if isinstance(w, WeightLeaf):
        raise PlanError(
            f"a {type(w).__name__} weight of shape {w.shape} is used as a plain value; this leaf "
            "takes Replace or no adapter at all"
        )
    return w if dtype is None else jnp.asarray(w, dtype)
