"""The Tucker map: a core contracted with one factor per axis of the kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Conv, Lookup, mm
from flora_jax.core.lowrank import transpose
from flora_jax.core.operators import LinearMap, operator, static
from flora_jax.core.spec import KernelSpec

Modes = Sequence[jax.Array | None]


def expand(core: jax.Array, factors: Modes) -> jax.Array:
    """``core x_1 A_1 ... x_N A_N`` with ``core [J_1..J_N]``, ``A_n [I_n, J_n]``; smallest first."""
    order = [n for n in range(core.ndim) if factors[n] is not None]
    for n in sorted(order, key=lambda n: factors[n].shape[0]):
        core = jnp.moveaxis(jnp.tensordot(core, factors[n], (n, 1)), -1, n)
    return core


def _modes(x: jax.Array, factors: Modes, *, into_core: bool) -> jax.Array:
    """Apply factors (``[I, J]``) to the trailing axes of ``x``, I to J or back."""
    lead = x.ndim - len(factors)
    for n, factor in enumerate(factors):
        if factor is None:
            continue
        axis = lead + n
        x = jnp.moveaxis(x, axis, -1)
        x = mm(x, factor if into_core else factor.T)
        x = jnp.moveaxis(x, -1, axis)
    return x


def _joined(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both with the batch axes that either has."""
    batch = max(a.shape[:-2], b.shape[:-2], key=len)
    return tuple(jnp.broadcast_to(m, (*batch, *m.shape[-2:])) for m in (a, b))


@operator
class Tucker(LinearMap):
    """``M`` = the canonical form of ``core x_1 A_1 ... x_N A_N`` over the axes of the kernel.

    Never forms the kernel: a dense kernel's input goes through the input factors, the core and the
    output factors; a convolution is a chain 1x1 -> small window -> 1x1.

    Args:
      core: ``[J_1 ... J_N]``, axes in the order in which the kernel is stored.
      modes: ``A_n [I_n, J_n]``, one per axis; None is the identity.
      spec: which axes are batch, input and output.
      transposed: the map from outputs to inputs.
    """

    core: jax.Array
    modes: tuple[jax.Array | None, ...]
    spec: KernelSpec = static()
    transposed: bool = static(default=False)

    def _pick(self, axes):
        return [self.modes[a] for a in axes]

    def _middle(self) -> jax.Array:
        """The core as ``[in, out]`` (``[B, in, out]`` with the batch factors applied)."""
        spec = self.spec
        core = jnp.transpose(self.core, spec.batch_axes + spec.in_axes + spec.out_axes)
        n_batch, n_in = len(spec.batch_axes), len(spec.in_axes)
        core = expand(core, self._pick(spec.batch_axes) + [None] * (core.ndim - n_batch))
        shape = core.shape
        flat = (math.prod(shape[n_batch : n_batch + n_in]), math.prod(shape[n_batch + n_in :]))
        core = core.reshape((math.prod(shape[:n_batch]), *flat) if n_batch else flat)
        return jnp.swapaxes(core, -1, -2) if self.transposed else core

    def _ends(self):
        ends = self._pick(self.spec.in_axes), self._pick(self.spec.out_axes)
        return ends[::-1] if self.transposed else ends

    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of the input as it comes, and of the output inside the core."""
        entering, leaving = self.spec.in_axes, self.spec.out_axes
        if self.transposed:
            entering, leaving = leaving, entering
        inner = self.core.shape
        outer = [n if mode is None else mode.shape[0] for n, mode in zip(inner, self.modes)]
        return tuple(outer[a] for a in entering), tuple(inner[a] for a in leaving)

    def _flat(self, y: jax.Array, axes: int) -> jax.Array:
        return y.reshape(*y.shape[: y.ndim - axes], math.prod(y.shape[y.ndim - axes :]))

    def _out(self, y: jax.Array) -> jax.Array:
        """From the flattened output core modes to canonical outputs."""
        out = self._ends()[1]
        y = y.reshape(*y.shape[:-1], *self._sizes()[1])
        return self._flat(_modes(y, out, into_core=False), len(out))

    def apply(self, inputs):
        if isinstance(inputs.how, Conv):
            return self._convolve(inputs.how, inputs.z)
        if isinstance(inputs.how, Lookup):
            z = inputs.how.contract(inputs.z, self.modes[0])
            return self._out(mm(z, self._middle()))
        return self.then(inputs.z)

    def then(self, y):
        into = self._ends()[0]
        y = y.reshape(*y.shape[:-1], *self._sizes()[0])
        y = self._flat(_modes(y, into, into_core=True), len(into))
        return self._out(mm(y, self._middle()))

    def _convolve(self, how: Conv, x: jax.Array) -> jax.Array:
        """1x1 into the core's channels, the small window, 1x1 out; per group when grouped."""
        *window, channels, out = self.modes
        groups = how.groups
        x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        x = self._flat(mm(x, channels), 2)
        small = jnp.tile(expand(self.core, [*window, None, None]), groups)
        y = dataclasses.replace(how, shape=small.shape).convolve(x, small)
        y = how.enter_out(y)
        if groups == 1:
            return mm(y, out.T)
        per_group = out.reshape(groups, out.shape[0] // groups, out.shape[1])
        return mm(y, jnp.swapaxes(per_group, 1, 2))

    def kernel(self) -> jax.Array:
        """The dense kernel in its stored layout."""
        return expand(self.core, list(self.modes))

    def dense(self):
        matrix = self.spec.canonical(self.kernel())
        return jnp.swapaxes(matrix, -1, -2) if self.transposed else matrix

    def factors(self):
        """The chain cut at the core's smaller side; a convolution's window counts as input."""
        eyes = [jnp.eye(n) if m is None else m for n, m in zip(self.core.shape, self.modes)]
        ends = dataclasses.replace(self, modes=tuple(eyes))._ends()
        into, out = (functools.reduce(jnp.kron, end, jnp.ones((1, 1))) for end in ends)
        middle = self._middle()
        out = transpose(out)
        groups = self.spec.groups
        if groups > 1 and self.transposed:
            into = into.reshape(groups, into.shape[0] // groups, into.shape[1])
        elif groups > 1:
            out = jnp.moveaxis(out.reshape(out.shape[0], groups, -1), 1, 0)
        if middle.shape[-2] < middle.shape[-1]:
            return _joined(into, jnp.matmul(middle, out))
        return _joined(jnp.matmul(into, middle), out)

    @property
    def T(self):
        return dataclasses.replace(self, transposed=not self.transposed)

    def flops(self):
        return 2 * (sum(m.size for m in self.modes if m is not None) + self.core.size)
