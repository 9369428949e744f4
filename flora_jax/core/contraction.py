"""How activations meet a kernel: one object per kind of contraction.

A contraction knows how to bring a layer's input to canonical form ``z: [..., in]``
(``[B, ..., in]`` with batch axes), how to contract it with any kernel that has the same inputs,
and how to bring a canonical output back to the layer's layout. Operators use these methods only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora_jax.core.errors import LazyError, PlanError
from flora_jax.core.spec import KernelSpec, split_equation


def mm(x: jax.Array, k: jax.Array, precision: Any = None) -> jax.Array:
    """``x [..., in] @ k [in, out]``, or per batch ``x [B, ..., in] @ k [B, in, out]``.

    ``k`` is cast to the activation dtype; sums run in float32 or better; the result has x's dtype.
    """
    k = k.astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if k.ndim == 2:
        dims = (((x.ndim - 1,), (0,)), ((), ()))
    else:
        dims = (((x.ndim - 1,), (1,)), ((0,), (0,)))
    y = lax.dot_general(x, k, dims, precision=precision, preferred_element_type=wide)
    return y.astype(x.dtype)


def over_batch(vector: jax.Array, y: jax.Array) -> jax.Array:
    """A per-channel vector ``[n]`` or ``[B, n]`` shaped to multiply ``y [..., n]``."""
    if vector.ndim == 2:
        vector = vector.reshape(vector.shape[0], *(1,) * (y.ndim - 2), vector.shape[1])
    return vector.astype(y.dtype)


class Contraction:
    """Base class; ``spec`` is the unstacked spec of the kernel, ``shape`` its shape.

    ``flat``: entered inputs are rows ``[..., in]``, so that any map of rows can come first.
    """

    spec: KernelSpec
    flat = False

    def base(self, x: Any, w: jax.Array) -> jax.Array:
        """The layer's own contraction, output in the layer's layout."""
        raise NotImplementedError

    def enter(self, x: Any) -> Any:
        """Layer input to what :meth:`contract` takes (canonical activations, image, ids)."""
        return x

    def leave(self, y: jax.Array) -> jax.Array:
        """Canonical output to the layer's layout."""
        return y

    def enter_out(self, y: jax.Array) -> jax.Array:
        """The layer's own output to canonical form: the inverse of :meth:`leave`."""
        return y

    def channels(self, y: jax.Array) -> jax.Array:
        """The layer's own output as ``[..., out]``, ``[B, ..., out]`` with batch axes.

        It is :meth:`enter_out`, but that the groups of a convolution stay side by side.
        """
        return self.enter_out(y)

    def from_channels(self, y: jax.Array) -> jax.Array:
        """The inverse of :meth:`channels`."""
        return self.leave(y)

    def contract(self, z: Any, k: jax.Array) -> jax.Array:
        """Entered input with a canonical kernel ``[in, n]`` or ``[B, in, n]``."""
        raise NotImplementedError

    def map_channels(self, z: Any, f: Callable[[jax.Array], jax.Array]) -> Any:
        """Apply ``f`` to the last (input channel) axis of the entered input."""
        raise LazyError(f"no input-side map for a {self.spec.kind} kernel")

    def unfold(self, z: Any) -> tuple[Contraction, jax.Array]:
        """The same contraction of rows ``[..., in]`` (``[B, ..., in]``), and the rows of ``z``."""
        if not self.flat:
            raise LazyError(f"the inputs of a {self.spec.kind} kernel are not unfolded into rows")
        return self, z


@dataclasses.dataclass(frozen=True)
class Dot(Contraction):
    """``y[..., o] = sum_i x[..., i] w[i, o]``, with any number of in and out axes."""

    flat = True

    spec: KernelSpec
    shape: tuple[int, ...]
    precision: Any = None

    def enter(self, x):
        n = len(self.spec.in_axes)
        return x.reshape(*x.shape[: x.ndim - n], math.prod(x.shape[x.ndim - n :]))

    def base(self, x, w):
        return self.leave(self.contract(self.enter(x), self.spec.canonical(w)))

    def leave(self, y):
        return y.reshape(*y.shape[:-1], *(self.shape[a] for a in self.spec.out_axes))

    def enter_out(self, y):
        n = len(self.spec.out_axes)
        return y.reshape(*y.shape[: y.ndim - n], math.prod(y.shape[y.ndim - n :]))

    def contract(self, z, k):
        return mm(z, k, self.precision)

    def map_channels(self, z, f):
        return f(z)


@dataclasses.dataclass(frozen=True)
class Einsum(Contraction):
    """``einsum(equation, x, w)``; batch, in and out letters as in ``KernelSpec.einsum``."""

    flat = True

    equation: str
    shape: tuple[int, ...]
    precision: Any = None

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec.einsum(self.equation)

    def _letters(self):
        lhs, rhs, out = split_equation(self.equation)
        spec = self.spec
        pick = lambda axes: "".join(rhs[a] for a in axes)
        batch, n_in, n_out = pick(spec.batch_axes), pick(spec.in_axes), pick(spec.out_axes)
        rest = "".join(c for c in lhs.replace("...", "") if c not in batch + n_in)
        dots = "..." if "..." in lhs else ""
        return lhs, out, batch, n_in, n_out, dots, rest

    def base(self, x, w):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = jnp.einsum(
            self.equation,
            x,
            w.astype(x.dtype),
            precision=self.precision,
            preferred_element_type=wide,
        )
        return y.astype(x.dtype)

    def _dims(self, letters: str) -> tuple[int, ...]:
        rhs = split_equation(self.equation)[1]
        return tuple(self.shape[rhs.index(c)] for c in letters)

    def enter(self, x):
        lhs, _, batch, n_in, _, dots, rest = self._letters()
        x = jnp.einsum(f"{lhs}->{batch}{dots}{rest}{n_in}", x)
        x = x.reshape(*x.shape[: x.ndim - len(n_in)], math.prod(self._dims(n_in)))
        return x.reshape(math.prod(self._dims(batch)), *x.shape[len(batch) :]) if batch else x

    def leave(self, y):
        _, out, batch, _, n_out, dots, rest = self._letters()
        if batch:
            y = y.reshape(*self._dims(batch), *y.shape[1:])
        y = y.reshape(*y.shape[:-1], *self._dims(n_out))
        return jnp.einsum(f"{batch}{dots}{rest}{n_out}->{out}", y)

    def enter_out(self, y):
        _, out, batch, _, n_out, dots, rest = self._letters()
        y = jnp.einsum(f"{out}->{batch}{dots}{rest}{n_out}", y)
        y = y.reshape(*y.shape[: y.ndim - len(n_out)], math.prod(self._dims(n_out)))
        return y.reshape(math.prod(self._dims(batch)), *y.shape[len(batch) :]) if batch else y

    def contract(self, z, k):
        return mm(z, k, self.precision)

    def map_channels(self, z, f):
        return f(z)


@dataclasses.dataclass(frozen=True)
class Conv(Contraction):
    """Convolution, channels last: ``x [batch, *space, I]``, kernel ``[*window, I/groups, O]``."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    groups: int = 1
    transpose: bool = False
    precision: Any = None

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec.conv(len(self.shape) - 2, groups=self.groups, transpose=self.transpose)

    def convolve(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """This layer's convolution with any kernel of the same window."""
        letters = "".join("HWDUV"[: w.ndim - 2])
        numbers = lax.conv_dimension_numbers(
            x.shape, w.shape, (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        )
        w = w.astype(x.dtype)
        if self.transpose:
            return lax.conv_transpose(
                x,
                w,
                self.strides,
                self.padding,
                rhs_dilation=self.rhs_dilation,
                dimension_numbers=numbers,
                precision=self.precision,
            )
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=numbers,
            feature_group_count=self.groups,
            precision=self.precision,
        )

    def base(self, x, w):
        return self.convolve(x, w)

    def leave(self, y):
        if self.groups > 1:
            y = jnp.moveaxis(y, 0, -2)
            y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])
        return y

    def enter_out(self, y):
        if self.groups > 1:
            y = y.reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)
            y = jnp.moveaxis(y, -2, 0)
        return y

    def channels(self, y):
        return y

    def from_channels(self, y):
        return y

    def contract(self, z, k):
        n = k.shape[-1]
        shape = (*self.shape[:-1], self.groups * n)
        return self.enter_out(self.convolve(z, self.spec.restore(k, shape)))

    def map_channels(self, z, f):
        return f(z)

    def unfold(self, z):
        return Patches(self), self._patches(z)

    def _patches(self, x: jax.Array) -> jax.Array:
        """Canonical rows ``[(groups,) N, *space, window * channels / groups]``.

        A transposed convolution is the plain one of its input with ``strides - 1`` zeros in
        between.
        """
        window, n = self.shape[:-2], len(self.shape) - 2
        letters = "".join("HWDUV"[:n])
        strides, padding, lhs_dilation = self.strides, self.padding, self.lhs_dilation
        if self.transpose:
            strides, padding, lhs_dilation = (1,) * n, self._transposed_padding(), self.strides
        p = lax.conv_general_dilated_patches(
            x,
            window,
            strides,
            padding,
            lhs_dilation,
            self.rhs_dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            # The copies must be exact where a float32 product is rounded by default.
            precision=lax.Precision.HIGHEST,
        )
        p = p.reshape(*p.shape[:-1], self.groups, self.shape[-2], *window)
        p = jnp.moveaxis(jnp.moveaxis(p, n + 2, -1), n + 1, 0)
        p = p.reshape(*p.shape[: n + 2], -1)
        return p if self.groups > 1 else p[0]

    def _transposed_padding(self) -> Sequence[tuple[int, int]]:
        """What ``lax.conv_transpose`` pads its dilated input with."""
        if not isinstance(self.padding, str):
            return self.padding
        window = self.shape[:-2]
        dilations, pads = self.rhs_dilation or (1,) * len(window), []
        for size, stride, dilation in zip(window, self.strides, dilations):
            k = (size - 1) * dilation + 1
            same = self.padding == "SAME"
            total = k + stride - 2 + (0 if same else max(k - stride, 0))
            before = k - 1 if not same or stride > k - 1 else -(-total // 2)
            pads.append((before, total - before))
        return pads


@dataclasses.dataclass(frozen=True)
class Patches(Contraction):
    """A convolution as a product with the rows of its input's patches."""

    conv: Conv
    flat = True

    @property
    def spec(self) -> KernelSpec:
        return self.conv.spec

    def leave(self, y):
        return self.conv.leave(y)

    def enter_out(self, y):
        return self.conv.enter_out(y)

    def contract(self, z, k):
        return mm(z, k, self.conv.precision)

    def map_channels(self, z, f):
        return f(z)


@dataclasses.dataclass(frozen=True)
class Lookup(Contraction):
    """Embedding: ``y[...] = w[ids[...]]``.

    Args:
      virtual: ids past the end are rows that an adapter adds: the table itself gives zeros for them
        instead of NaN.
    """

    shape: tuple[int, ...]
    dtype: Any
    virtual: bool = False

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec.embedding()

    def base(self, ids, w):
        past = 0 if self.virtual else None
        return jnp.take(w, ids, axis=0, mode="fill", fill_value=past).astype(self.dtype)

    def contract(self, ids, k):
        return self.base(ids, k)


def check_conv(strides: Any, window: int, name: str) -> tuple[int, ...]:
    """An int or a sequence as one value per window axis.

    Raises:
      PlanError: the number of values differs from the window's rank.
    """
    if strides is None:
        return (1,) * window
    values = (strides,) * window if isinstance(strides, int) else tuple(strides)
    if len(values) != window:
        raise PlanError(f"{name}={strides} for a convolution with {window} window axes")
    return values
