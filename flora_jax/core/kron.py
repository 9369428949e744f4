"""Products of small matrices: Kronecker, and Hadamard products of low rank."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Conv, Lookup, mm
from flora_jax.core.lowrank import transpose
from flora_jax.core.operators import LinearMap, operator, static


def _einsum(equation: str, y: jax.Array, factor: jax.Array) -> jax.Array:
    """In y's dtype, sums in float32 or better."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    factor = factor.astype(y.dtype)
    return jnp.einsum(equation, y, factor, preferred_element_type=wide).astype(y.dtype)


@operator
class Kron(LinearMap):
    """``M = sum_k left_k (x) right_k``, rows ``(window, m, p)``, columns ``(n, q)``.

    The left factor mixes blocks of channels, the right one acts inside a block; a convolution's
    window belongs to the right one, which is then a convolution over each of the m blocks. M is
    never formed: a row costs ``k (m p q + m n q)`` multiply-adds (or the other order) in place of
    ``mp nq``. An embedding looks up one row of each factor.

    Args:
      left: ``[*B, k, m, n]``.
      right: ``[*B, k, window * p, q]``.
      window: taps of a convolution.
      transposed: the map from outputs to inputs.
    """

    left: jax.Array
    right: jax.Array
    window: int = static(default=1)
    transposed: bool = static(default=False)

    def _right(self) -> jax.Array:
        """The right factor as ``[*B, k, window, p, q]``."""
        *lead, rows, q = self.right.shape
        return self.right.reshape(*lead, self.window, rows // self.window, q)

    def apply(self, inputs):
        if isinstance(inputs.how, Conv):
            return self._convolve(inputs.how, inputs.z)
        if isinstance(inputs.how, Lookup):
            return self._look_up(inputs.how, inputs.z)
        return self.then(inputs.z)

    def then(self, y):
        left, right = self.left, self._right()
        (m, n), (w, p, q) = left.shape[-2:], right.shape[-3:]
        into, out, sizes = "wmp", "nq", (w, m, p)
        if self.transposed:
            into, out, sizes = "nq", "wmp", (n, q)
        by_right, by_left = self._costs()
        middle = "kmq" if by_right <= by_left else "kwnp"
        # One factor at a time: a joint einsum may prefer to form the matrix.
        steps = [("kwpq", right), ("kmn", left)]
        if (middle == "kmq") == self.transposed:
            steps.reverse()
        b = "b" if left.ndim == 4 else ""
        y = y.reshape(*y.shape[:-1], *sizes)
        for at, to, (letters, factor) in zip((into, middle), (middle, out), steps):
            y = _einsum(f"{b}...{at},{b}{letters}->{b}...{to}", y, factor)
        return y.reshape(*y.shape[: y.ndim - len(out)], math.prod(y.shape[y.ndim - len(out) :]))

    def _costs(self) -> tuple[int, int]:
        """Multiply-adds of one term and row through ``(m, q)`` and through ``(window, n, p)``."""
        (m, n), (rows, q) = self.left.shape[-2:], self.right.shape[-2:]
        return m * rows * q + m * n * q, m * n * rows + n * rows * q

    def _convolve(self, how: Conv, x: jax.Array) -> jax.Array:
        """One convolution into the terms' q channels over all m blocks, then the left mixing."""
        left, right = self.left, self._right()
        if left.ndim == 3:
            left, right = left[None], right[None]
        groups, terms, _, p, q = right.shape
        m = left.shape[-2]
        kernel = jnp.moveaxis(right, (2, 3), (0, 1))
        kernel = kernel.reshape(*how.shape[:-2], p, groups * terms * q)
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, m, p), -2, 0)
        blocks, images, *space = x.shape[:-2]
        y = how.convolve(x.reshape(blocks * images, *space, groups * p), kernel)
        y = y.reshape(blocks, images, *y.shape[1:-1], groups, terms, q)
        y = _einsum("m...gkq,gkmn->g...nq", y, left)
        y = y.reshape(*y.shape[:-2], y.shape[-2] * q)
        return y if self.left.ndim == 4 else y[0]

    def _look_up(self, how: Lookup, ids: jax.Array) -> jax.Array:
        p = self.right.shape[-2]
        left = jnp.take(self.left, ids // p, axis=-2)
        right = jnp.take(self.right, ids % p, axis=-2)
        y = jnp.einsum("k...n,k...q->...nq", left, right)
        return y.reshape(*ids.shape, y.shape[-2] * y.shape[-1]).astype(how.dtype)

    def dense(self):
        matrix = jnp.einsum("...kmn,...kwpq->...wmpnq", self.left, self._right())
        *lead, w, m, p, n, q = matrix.shape
        matrix = matrix.reshape(*lead, w * m * p, n * q)
        return transpose(matrix) if self.transposed else matrix

    @property
    def T(self):
        return dataclasses.replace(self, transposed=not self.transposed)

    def flops(self):
        return 2 * math.prod(self.left.shape[:-2]) * min(self._costs())


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Row-wise Khatri-Rao product: ``[..., n, r]``, ``[..., n, s]`` to ``[..., n, r s]``."""
    product = a[..., :, None] * b[..., None, :]
    return product.reshape(*product.shape[:-2], product.shape[-2] * product.shape[-1])


@operator
class Hadamard(LinearMap):
    """``M = (a1 b1) * (a2 b2)`` elementwise, ``a [*B, in, r]``, ``b [*B, r, out]``.

    It equals one low-rank product whose factors are Khatri-Rao products of rank ``r^2``; these are
    formed, M is not. An embedding multiplies the rows it looks up.
    """

    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array

    def factors(self):
        """The Khatri-Rao factors ``a [*B, in, r^2]``, ``b [*B, r^2, out]``."""
        b = row_products(transpose(self.b1), transpose(self.b2))
        return row_products(self.a1, self.a2), transpose(b)

    def apply(self, inputs):
        how, z = inputs.how, inputs.z
        if isinstance(how, Lookup):
            return mm(how.contract(z, self.a1), self.b1) * mm(how.contract(z, self.a2), self.b2)
        a, b = self.factors()
        return mm(how.contract(z, a), b)

    def then(self, y):
        a, b = self.factors()
        return mm(mm(y, a), b)

    def dense(self):
        return jnp.matmul(self.a1, self.b1) * jnp.matmul(self.a2, self.b2)

    @property
    def T(self):
        return Hadamard(*map(transpose, (self.b1, self.a1, self.b2, self.a2)))

    def flops(self):
        *_, n_in, r = self.a1.shape
        n_out, s = self.b1.shape[-1], self.a2.shape[-1]
        return 2 * math.prod(self.a1.shape[:-2]) * r * s * (n_in + n_out)
