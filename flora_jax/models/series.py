"""A quantum sequence cell as a Linen module that predicts what follows a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention.quantum import QFWP, QRNN
from flora_jax.attention.quantum.cell import Uniform
from flora_jax.linen.layers import weight


class SeriesModel(nn.Module):
    """Parameters of a cell (``QFWP``, ``StaticVQC``, ``QRNN``, ``QRNNReservoir``) as Linen leaves.

    The tree is that of ``cell.init``; kernels may have adapters.

    >>> model = SeriesModel(QRNN())
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4, 1)))
    >>> sorted(variables["params"]), model.apply(variables, jnp.ones((2, 4, 1))).shape
    (['angles', 'readout'], (2, 1))
    """

    cell: QFWP | QRNN
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [B, T, D]`` to the last token's output ``[B, O]``."""
        params: dict[str, Any] = {}
        for path, leaf in self.cell.leaves().items():
            group, _, name = path.rpartition("/")
            if group:
                params.setdefault(group, {})[name] = leaf
            else:
                params[name] = weight(self, name, leaf, leaf.shape, self.param_dtype)
        layers = {k: v for k, v in params.items() if isinstance(v, dict)}
        params |= {k: _Layer(v, self.param_dtype, name=k)() for k, v in layers.items()}
        return self.cell.apply(params, x, last=True)[0][:, 0]

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        return (jnp.zeros((1, 1, self.cell.features)),)


class _Layer(nn.Module):
    """The weights of a linear layer; the cell applies them."""

    leaves: Mapping[str, Uniform]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return {
            name: weight(self, name, leaf, leaf.shape, self.param_dtype)
            for name, leaf in self.leaves.items()
        }
