"""An attention variant as a Linen module, whose parameters lie beside the projections."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention import Sizes, Variant
from flora_jax.core.errors import StructureError, unknown


class FloraAttention(nn.Module):
    """``variant.attend`` with the variant's parameters; a variant without any adds none.

    >>> from flora_jax.attention import Softmax
    >>> sizes = Sizes(heads=4, kv_heads=2, dim=8, width=32)
    >>> q, k = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
    >>> FloraAttention(Softmax(), sizes).apply({}, q, k, k)[0].shape
    (1, 3, 4, 8)
    """

    variant: Variant
    sizes: Sizes
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, **call: Any
    ) -> tuple[jax.Array, Any]:
        """``(out [B, T, N, H], state)``; the arguments are those of :meth:`Variant.attend`."""
        self.variant.check(self.sizes)
        return self.variant.attend(self._params(), q, k, v, **call)

    def _params(self) -> dict[str, Any]:
        make = lambda key: self.variant.init(key, self.sizes, jnp.dtype(self.param_dtype))
        if self.is_initializing():
            # One call makes all arrays, since some belong together.
            for name, value in make(self.make_rng("params")).items():
                self.put_variable("params", name, value)
        names = jax.eval_shape(make, jax.random.key(0))
        stored = self.variables.get("params", {})
        for name in names:
            if name not in stored:
                path = "/".join(self.path)
                raise StructureError(f"{path}: " + unknown("parameter", name, stored))
        return {name: stored[name] for name in names}
