"""Singular values with fixed signs: full, randomised, and of a product of two factors.

All functions take leading batch axes, work in float32 or better and never look at data to choose
a shape, so they can be jitted and vmapped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.core.errors import PlanError


class SVD(NamedTuple):
    """``matrix = u diag(s) vt``: ``u [.., m, k]``, ``s [.., k]`` falling, ``vt [.., k, n]``."""

    u: jax.Array
    s: jax.Array
    vt: jax.Array

    def dense(self) -> jax.Array:
        """The product ``[.., m, n]``."""
        return jnp.matmul(self.u * self.s[..., None, :], self.vt)

    def truncate(self, rank: int) -> SVD:
        """The leading ``rank`` triplets."""
        return SVD(self.u[..., :rank], self.s[..., :rank], self.vt[..., :rank, :])

    def split(self) -> tuple[jax.Array, jax.Array]:
        """Balanced factors ``a = u sqrt(s)``, ``b = sqrt(s) vt``."""
        root = jnp.sqrt(self.s)
        return self.u * root[..., None, :], root[..., :, None] * self.vt


def _wide(matrix: jax.Array) -> jax.Array:
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def fix_signs(u: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each pair turned so that the largest entry of the column of u is positive."""
    top = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    sign = jnp.where(top < 0, -1.0, 1.0).astype(u.dtype)
    return u * sign, vt * jnp.swapaxes(sign, -1, -2)


def svd(matrix: jax.Array) -> SVD:
    """The thin SVD ``[.., m, n]``, ``k = min(m, n)``, signs fixed by the columns of u.

    >>> svd(jnp.diag(jnp.array([1.0, -3.0]))).s.tolist()
    [3.0, 1.0]
    """
    u, s, vt = jnp.linalg.svd(_wide(matrix), full_matrices=False)
    u, vt = fix_signs(u, vt)
    return SVD(u, s, vt)


def randomized_svd(
    matrix: jax.Array, rank: int, key: jax.Array, *, oversample: int = 8, iterations: int = 4
) -> SVD:
    """The leading ``rank`` triplets by a random range finder with orthonormalised power steps.

    ``Y = M G``, ``G [n, rank + oversample]`` normal; ``iterations`` times ``Q = qr(M qr(M^T Q))``;
    then the SVD of the small ``Q^T M``. Cost ``O(m n (rank + oversample))`` against
    ``O(m n min(m, n))`` for the full one; the error is near the best one where singular values
    fall, and grows where they are flat (raise ``iterations``).

    Args:
      matrix: ``[.., m, n]``.
      rank: triplets to return, at most ``min(m, n)``.
      key: of the test matrix; one draw for all leading axes.
      oversample: further columns of the sketch.
      iterations: power steps.

    Raises:
      PlanError: the rank is outside ``1..min(m, n)``.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    m, n = matrix.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise PlanError(f"rank={rank} is outside 1..{min(m, n)} of a {m}x{n} matrix")
    matrix = _wide(matrix)
    columns = min(rank + oversample, m, n)
    sketch = jax.random.normal(key, (n, columns), matrix.dtype)
    q = jnp.linalg.qr(jnp.matmul(matrix, sketch))[0]
    for _ in range(iterations):
        z = jnp.linalg.qr(jnp.matmul(jnp.swapaxes(matrix, -1, -2), q))[0]
        q = jnp.linalg.qr(jnp.matmul(matrix, z))[0]
    small = svd(jnp.matmul(jnp.swapaxes(q, -1, -2), matrix))
    u, vt = fix_signs(jnp.matmul(q, small.u), small.vt)
    return SVD(u, small.s, vt).truncate(rank)


def product_svd(a: jax.Array, b: jax.Array) -> SVD:
    """The SVD of ``a b`` (``a [.., m, r]``, ``b [.., r, n]``) without forming the product.

    QR of both factors, then the SVD of the small ``R_a R_b^T``: ``k = min(m, n, r)``.
    """
    qa, ra = jnp.linalg.qr(_wide(a))
    qb, rb = jnp.linalg.qr(_wide(jnp.swapaxes(b, -1, -2)))
    small = svd(jnp.matmul(ra, jnp.swapaxes(rb, -1, -2)))
    u, vt = fix_signs(jnp.matmul(qa, small.u), jnp.matmul(small.vt, jnp.swapaxes(qb, -1, -2)))
    return SVD(u, small.s, vt)
