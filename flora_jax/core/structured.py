"""Structured maps: diagonal, blocks, sparse, permutation, input channels, dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import over_batch
from flora_jax.core.errors import LazyError
from flora_jax.core.lowrank import transpose
from flora_jax.core.operators import Compose, LinearMap, operator, static


@operator
class Diag(LinearMap):
    """``M = diag(values)``, values ``[n]`` or ``[B, n]``."""

    values: jax.Array

    def then(self, y):
        return y * over_batch(self.values, y)

    def dense(self):
        return self.values[..., None] * jnp.eye(self.values.shape[-1], dtype=self.values.dtype)

    @property
    def T(self):
        return self

    def flops(self):
        return self.values.size


@operator
class BlockDiag(LinearMap):
    """``M = blockdiag(blocks)``, blocks ``[n, p, q]`` or ``[B, n, p, q]``."""

    blocks: jax.Array

    def then(self, y):
        *batch, n, p, q = self.blocks.shape
        z = y.reshape(*y.shape[:-1], n, p)
        b = "b" if batch else ""
        z = jnp.einsum(f"{b}...np,{b}npq->{b}...nq", z, self.blocks.astype(y.dtype))
        return z.reshape(*y.shape[:-1], n * q)

    def dense(self):
        *batch, n, p, q = self.blocks.shape
        eye = jnp.eye(n, dtype=self.blocks.dtype)
        wide = jnp.einsum("...npq,nm->...npmq", self.blocks, eye)
        return wide.reshape(*batch, n * p, n * q)

    @property
    def T(self):
        return BlockDiag(transpose(self.blocks))

    def flops(self):
        return 2 * self.blocks.size


@operator
class Sparse(LinearMap):
    """``M[rows, cols] += values`` and zero elsewhere; ``size = (in, out)``."""

    rows: jax.Array
    cols: jax.Array
    values: jax.Array
    size: tuple[int, int] = static()

    def then(self, y):
        picked = jnp.take(y, self.rows, axis=-1) * self.values.astype(y.dtype)
        out = jnp.zeros((*y.shape[:-1], self.size[1]), y.dtype)
        return out.at[..., self.cols].add(picked)

    def dense(self):
        return jnp.zeros(self.size, self.values.dtype).at[self.rows, self.cols].add(self.values)

    @property
    def T(self):
        return Sparse(self.cols, self.rows, self.values, self.size[::-1])

    def flops(self):
        return 2 * self.values.size


@operator
class Permute(LinearMap):
    """``(x M)[j] = x[index[j]]``."""

    index: jax.Array

    def then(self, y):
        return jnp.take(y, self.index, axis=-1)

    def dense(self):
        return jnp.eye(self.index.shape[0])[:, self.index]

    @property
    def T(self):
        return Permute(jnp.argsort(self.index))

    def flops(self):
        return 0


@operator
class Channelwise(LinearMap):
    """A map on the input channels of a layer: ``I_window (x) inner`` for a convolution."""

    on_inputs = True

    inner: LinearMap
    window: int = static(default=1)

    def apply(self, inputs):
        raise LazyError("Channelwise acts on a layer's input; compose it with a kernel map")

    def channels(self, y):
        return self.inner.then(y)

    def then(self, y):
        z = self.inner.then(y.reshape(*y.shape[:-1], self.window, y.shape[-1] // self.window))
        return z.reshape(*y.shape[:-1], self.window * z.shape[-1])

    def _at_every_place(self, matrix):
        eye = jnp.eye(self.window, dtype=matrix.dtype)
        batch, (n, m) = matrix.shape[:-2], matrix.shape[-2:]
        wide = jnp.einsum("vw,...nm->...vnwm", eye, matrix)
        return wide.reshape(*batch, self.window * n, self.window * m)

    def dense(self):
        return self._at_every_place(self.inner.dense())

    def identity_factors(self):
        found = self.inner.identity_factors()
        return None if found is None else tuple(map(self._at_every_place, found))

    @property
    def T(self):
        return Channelwise(self.inner.T, self.window)

    def flops(self):
        return self.window * self.inner.flops()


@operator
class Patchwise(LinearMap):
    """A map of a layer's whole input: on a convolution, of each patch ``[window * channels]``.

    The patches are formed (``window`` times the input's memory); the kernel is then one product.
    """

    on_inputs = True

    inner: LinearMap

    def apply(self, inputs):
        raise LazyError("Patchwise acts on a layer's input; compose it with a kernel map")

    def before(self, inputs):
        return inputs.unfold().map(self.inner.then)

    def then(self, y):
        return self.inner.then(y)

    def dense(self):
        return self.inner.dense()

    def factors(self):
        return self.inner.factors()

    def identity_factors(self):
        return self.inner.identity_factors()

    @property
    def T(self):
        return Patchwise(self.inner.T)

    def flops(self):
        return self.inner.flops()


@operator
class Dropout(LinearMap):
    """Inverted dropout on a branch's input; the identity as a matrix."""

    on_inputs = True

    key: jax.Array
    rate: float = static()

    def then(self, y):
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, y.shape)
        return jnp.where(keep, y / (1.0 - self.rate), jnp.zeros_like(y))

    def dense(self):
        raise LazyError("a map with active dropout has no matrix; bind without rng to merge")

    @property
    def T(self):
        return self

    def flops(self):
        return 0


def branch(inner: LinearMap, rate: float, key: jax.Array | None) -> LinearMap:
    """A map with dropout on its input when a key is given."""
    return inner if key is None or rate == 0.0 else Compose(Dropout(key, rate), inner)
