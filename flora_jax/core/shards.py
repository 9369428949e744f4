"""Maps that share one block between the shards of an axis."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.contraction import Conv, Lookup, mm
from flora_jax.core.lowrank import transpose
from flora_jax.core.operators import Compose, LinearMap, Matrix, operator, static


@operator
class Fold(LinearMap):
    """``M [n, r]``, a single 1 in each row: sums the n entries of an axis into r places.

    Args:
      n, r: sizes.
      runs: entry k goes to place ``floor(k r / n)`` (r runs of neighbours) instead of ``k mod r``
        (shards of length r lie on each other; the last one may be shorter).
      spread: the transpose ``[r, n]``, which repeats r entries.
    """

    n: int = static()
    r: int = static()
    runs: bool = static(default=False)
    spread: bool = static(default=False)

    @property
    def places(self) -> np.ndarray:
        """The place ``[n]`` of each entry."""
        k = np.arange(self.n)
        return k * self.r // self.n if self.runs else k % self.r

    def apply(self, inputs):
        if inputs.how.flat or self.spread:
            return super().apply(inputs)
        if isinstance(inputs.how, Conv):
            return self._convolve(inputs.how, inputs.z)
        return inputs.how.contract(inputs.z, self.dense())

    def _convolve(self, how: Conv, x: jax.Array) -> jax.Array:
        """A convolution with 0/1 kernels into r channels; the channels are folded first if any."""
        *window, channels, _ = how.shape
        groups, fold = how.groups, self
        if channels % self.r == 0 and not self.runs:
            x = x.reshape(*x.shape[:-1], groups, channels // self.r, self.r).sum(-2)
            x = x.reshape(*x.shape[:-2], groups * self.r)
            how = dataclasses.replace(how, shape=(*window, self.r, groups * self.r))
            fold = Fold(math.prod(window) * self.r, self.r)
        kernel = fold.dense()
        return how.contract(x, jnp.stack([kernel] * groups) if groups > 1 else kernel)

    def then(self, y):
        n, r = self.n, self.r
        lead = y.shape[:-1]
        if self.spread:
            if n % r:
                return jnp.take(y, self.places, axis=-1)
            if self.runs:
                return jnp.repeat(y, n // r, axis=-1)
            return jnp.tile(y, n // r)
        if not self.runs:
            y = jnp.pad(y, [(0, 0)] * len(lead) + [(0, -n % r)])
            return y.reshape(*lead, -1, r).sum(-2)
        if n % r == 0:
            return y.reshape(*lead, r, n // r).sum(-1)
        return jnp.zeros((*lead, r), y.dtype).at[..., self.places].add(y)

    def dense(self):
        matrix = jax.nn.one_hot(self.places, self.r, dtype=jnp.float32)
        return matrix.T if self.spread else matrix

    @property
    def T(self):
        return dataclasses.replace(self, spread=not self.spread)

    def flops(self):
        return self.n


@operator
class Shards(LinearMap):
    """``M [n, out]``, row k is row ``k mod r`` of a block ``[r, out]`` (or ``[B, r, out]``).

    The input's shards of length r are summed, then meet the block: one product of r rows. A lookup
    takes row ``id mod r``.
    """

    block: jax.Array
    n: int = static()

    @property
    def fold(self) -> Fold:
        """The sum of the shards."""
        return Fold(self.n, self.block.shape[-2])

    def apply(self, inputs):
        if isinstance(inputs.how, Lookup):
            return inputs.how.contract(inputs.z % self.block.shape[-2], self.block)
        return mm(self.fold.apply(inputs), self.block)

    def then(self, y):
        return mm(self.fold.then(y), self.block)

    def dense(self):
        return jnp.take(self.block, self.fold.places, axis=-2)

    def factors(self):
        *batch, r, n_out = self.block.shape
        wide = lambda m: jnp.broadcast_to(m, (*batch, *m.shape))
        if n_out < r:
            return self.dense(), wide(jnp.eye(n_out))
        return wide(self.fold.dense()), self.block

    @property
    def T(self):
        return Compose(Matrix(transpose(self.block)), self.fold.T)

    def flops(self):
        return self.n + 2 * self.block.size
