"""What Flax's own layers do with a kernel, for kernels that are weight leaves.

One function per kind of layer, shared by the Linen interceptor and the NNX class swap. Each takes
the values of the layer's fields and repeats its shapes, padding, promotion and bias exactly; the
product itself goes through :func:`flora_jax.core.leaf.contract`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Contraction, Conv, Dot, Einsum, Lookup
from flora_jax.core.errors import LazyError, PlanError, StructureError
from flora_jax.core.leaf import WeightLeaf, attend, contract
from flora_jax.core.paths import canonical
from flora_jax.core.spec import KernelSpec, split_equation

Pads = str | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """A layer's dtypes: ``promote(x, kernel, bias) -> same, cast``, precision, output dtype."""

    promote: Callable[..., Sequence[Any]]
    precision: Any = None
    preferred: Any = None

    def cast(self, x: Any, kernel: WeightLeaf, bias: Any) -> tuple[jax.Array, Any, Any]:
        """``(x, bias, output dtype)``; the kernel is represented by a scalar of its dtype.

        Raises:
          LazyError: a custom ``promote_dtype`` gives input and kernel different dtypes.
        """
        x, scalar, bias = self.promote(jnp.asarray(x), jnp.zeros((), kernel.dtype), bias)
        if scalar.dtype != x.dtype:
            raise LazyError(
                f"promote_dtype gives a {x.dtype} input and a {scalar.dtype} kernel; an adapted "
                "kernel is applied in the input's dtype"
            )
        out = jnp.dtype(self.preferred or x.dtype)
        return x.astype(jnp.promote_types(x.dtype, out)), bias, out


def dense_general_spec(batch: int, n_in: int, n_out: int) -> KernelSpec:
    """``(*batch, *in, *out)``: Linen and NNX Dense, DenseGeneral, Linear, LinearGeneral."""
    if not batch:
        return KernelSpec.dense(n_in, n_out)
    axes = tuple(range(batch + n_in + n_out))
    return KernelSpec(
        kind="einsum",
        batch_axes=axes[:batch],
        in_axes=axes[batch : batch + n_in],
        out_axes=axes[batch + n_in :],
    )


def check_shape(kernel: WeightLeaf, expected: Sequence[int | None]) -> None:
    """Raise StructureError unless the kernel has the layer's shape; None is any size."""
    fits = len(expected) == kernel.ndim and all(
        want in (None, got) for want, got in zip(expected, kernel.shape)
    )
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in expected)
        raise StructureError(f"kernel shape {kernel.shape}, the layer and its input need ({sizes})")


def dense_general(
    x: Any,
    kernel: WeightLeaf,
    bias: Any,
    numerics: Numerics,
    *,
    features: Sequence[int],
    axis: Sequence[int] = (-1,),
    batch: int = 0,
) -> jax.Array:
    """``y[b, ..., out] = sum_in x[b, ..., in] w[b, in, out] + bias[b, out]``.

    Args:
      axis: the contracted axes of x; the kernel has them in ascending order.
      batch: how many leading axes of x and of the kernel are batch axes.
    """
    x, bias, out = numerics.cast(x, kernel, bias)
    axis = sorted(a % x.ndim for a in axis)
    rest = [a for a in range(batch, x.ndim) if a not in axis]
    check_shape(kernel, (*x.shape[:batch], *(x.shape[a] for a in axis), *features))
    how: Contraction
    if batch:
        letters = string.ascii_letters
        lhs, outs = letters[: x.ndim], letters[x.ndim : x.ndim + len(features)]
        pick = lambda axes: "".join(lhs[a] for a in axes)
        equation = f"{lhs},{lhs[:batch]}{pick(axis)}{outs}->{lhs[:batch]}{pick(rest)}{outs}"
        how = Einsum(equation, kernel.shape, numerics.precision)
    else:
        x = jnp.transpose(x, (*rest, *axis))
        spec = dense_general_spec(0, len(axis), len(features))
        how = Dot(spec, kernel.shape, numerics.precision)
    y = contract(how, x, kernel).astype(out)
    if bias is None:
        return y
    return y + bias.reshape(*bias.shape[:batch], *(1,) * len(rest), *bias.shape[batch:])


def einsum(
    x: Any, kernel: WeightLeaf, bias: Any, numerics: Numerics, *, equation: str
) -> jax.Array:
    """``einsum(equation, x, w) + bias``; the bias has the kernel axes that reach the output."""
    x, bias, out_dtype = numerics.cast(x, kernel, bias)
    lhs, rhs, out = split_equation(equation)
    if len(rhs) != kernel.ndim:
        raise StructureError(f"kernel shape {kernel.shape} does not fit the einsum {equation!r}")
    how = Einsum(equation.replace(" ", ""), kernel.shape, numerics.precision)
    y = contract(how, x, kernel).astype(out_dtype)
    if bias is None:
        return y
    sizes = dict(zip(rhs, kernel.shape))
    dots = x.ndim - len(lhs.replace("...", ""))
    shape: list[int] = []
    for token in re.findall(r"\.\.\.|[A-Za-z]", out):
        shape += [1] * dots if token == "..." else [sizes.get(token, 1)]
    return y + bias.reshape(shape)


def per_axis(value: int | Sequence[int] | None, window: int) -> tuple[int, ...]:
    """Strides or dilations as one number per window axis; None is 1."""
    if value is None or isinstance(value, int):
        return (value or 1,) * window
    return tuple(value)


def paddings(padding: Any, window: int) -> Pads:
    """Flax's forms of padding as a string or ``((low, high), ...)``.

    Raises:
      PlanError: none of the forms.
    """
    if isinstance(padding, str):
        return padding
    rows = (padding,) * window if isinstance(padding, int) else tuple(padding)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in rows)
    if len(pairs) != window or any(len(p) != 2 for p in pairs):
        raise PlanError(f"padding={padding!r} for a convolution with {window} window axes")
    return pairs


def _pad_input(x: jax.Array, padding: Pads, size: Sequence[int], dilation: Sequence[int]):
    """Apply Flax's own paddings (periodic, reflecting, causal) to x: ``(x, lax padding)``."""
    reach = [(k - 1) * d for k, d in zip(size, dilation)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        return jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "reflect"), "VALID"
    if padding == "CAUSAL":
        if len(size) != 1:
            raise PlanError(f"padding='CAUSAL' is for one window axis, this kernel has {len(size)}")
        return jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
    return x, padding


def _flat_batch(x: jax.Array, window: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Any number of batch axes as one, and their shape."""
    lead = x.shape[: x.ndim - window - 1]
    return x.reshape(math.prod(lead), *x.shape[len(lead) :]), lead


def conv(
    x: Any,
    kernel: WeightLeaf,
    bias: Any,
    numerics: Numerics,
    *,
    features: int,
    size: Sequence[int],
    strides: Any = 1,
    padding: Any = "SAME",
    input_dilation: Any = 1,
    kernel_dilation: Any = 1,
    groups: int = 1,
) -> jax.Array:
    """Channels-last convolution with shared weights, ``w [*window, in / groups, out]``."""
    window = len(size)
    x, lead = _flat_batch(jnp.asarray(x), window)
    dilation = per_axis(kernel_dilation, window)
    x, pads = _pad_input(x, paddings(padding, window), size, dilation)
    x, bias, out = numerics.cast(x, kernel, bias)
    check_shape(kernel, (*size, x.shape[-1] // groups, features))
    how = Conv(
        kernel.shape,
        per_axis(strides, window),
        pads,
        per_axis(input_dilation, window),
        dilation,
        groups,
        False,
        numerics.precision,
    )
    y = contract(how, x, kernel).astype(out)
    y = y if bias is None else y + bias
    return y.reshape(*lead, *y.shape[1:])


def conv_transpose(
    x: Any,
    kernel: WeightLeaf,
    bias: Any,
    numerics: Numerics,
    *,
    features: int,
    size: Sequence[int],
    strides: Any = None,
    padding: Any = "SAME",
    kernel_dilation: Any = None,
) -> jax.Array:
    """``lax.conv_transpose`` with ``w [*window, in, out]`` (not ``transpose_kernel``)."""
    window = len(size)
    x, lead = _flat_batch(jnp.asarray(x), window)
    x, bias, out = numerics.cast(x, kernel, bias)
    check_shape(kernel, (*size, x.shape[-1], features))
    steps, pads = per_axis(strides, window), paddings(padding, window)
    how = Conv(
        kernel.shape,
        steps,
        "VALID" if pads == "CIRCULAR" else pads,
        None,
        per_axis(kernel_dilation, window),
        1,
        True,
        numerics.precision,
    )
    y = contract(how, x, kernel).astype(out)
    if pads == "CIRCULAR":
        y = _fold(y, [n * step for n, step in zip(x.shape[1:-1], steps)])
    y = y if bias is None else y + bias
    return y.reshape(*lead, *y.shape[1:])


def _fold(y: jax.Array, periods: Sequence[int]) -> jax.Array:
    """Wrap the full output of a transposed convolution around its periods.

    Padded to whole periods so that the input's origin falls on one, then summed over them; the
    odd element goes in front, as in Flax.
    """
    missing = [-(n - period) % (2 * period) for n, period in zip(y.shape[1:-1], periods)]
    y = jnp.pad(y, [(0, 0), *(((m + 1) // 2, m // 2) for m in missing), (0, 0)])
    for axis, period in enumerate(periods, start=1):
        y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
    return y


def embed(ids: Any, table: WeightLeaf, dtype: Any) -> jax.Array:
    """Rows of the table; a table of one row answers every id, as in Flax."""
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise StructureError(f"embedding ids must be integers, these are {ids.dtype}")
    if table.shape[0] == 1:
        ids = jnp.zeros_like(ids)
    return contract(Lookup(table.shape, dtype), ids, table)


def embed_attend(query: Any, table: WeightLeaf, numerics: Numerics) -> jax.Array:
    """``query [..., features] -> logits [..., rows]``."""
    query, _, _ = numerics.cast(query, table, None)
    return attend(query, table)


def refuse(**fields: Any) -> None:
    """Raise LazyError for the first field of a layer that a weight leaf cannot honour."""
    for name, value in fields.items():
        if value is not None and value is not False:
            raise LazyError(
                f"the layer has {name}={value!r}, which an adapted kernel does not go through; "
                "materialize() the weight or leave this path out of the plan"
            )


def no_spec(ndim: int) -> KernelSpec:
    """The spec of a kernel that no adapter can be applied to lazily."""
    return KernelSpec(kind="other", in_axes=tuple(range(ndim - 1)), out_axes=(ndim - 1,))


def stacked(
    path: str, spec: KernelSpec, whole: tuple[int, ...], shape: tuple[int, ...]
) -> KernelSpec:
    """The spec of a stored kernel, given the layer's spec and the kernel shape the layer sees.

    Raises:
      PlanError: the stored shape is not the layer's with leading axes.
    """
    extra = len(whole) - len(shape)
    if extra < 0 or whole[extra:] != shape:
        raise PlanError(
            f"{path}: stored shape {whole}, the layer sees {shape}; stack parameters along the "
            "first axis (variable_axes={'params': 0})"
        )
    return dataclasses.replace(spec, stack_ndim=extra)


def exact_first(specs: dict[str, KernelSpec]) -> dict[str, KernelSpec]:
    """Specs by pattern, those of an indexed block first.

    A pattern without a block's index (``layers/...``) also matches the indexed paths
    (``layers_0/...``), whose own patterns would never be reached behind it.
    """
    return dict(sorted(specs.items(), key=lambda item: canonical(item[0]) == item[0]))
