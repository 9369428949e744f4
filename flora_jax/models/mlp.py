"""Multi-layer perceptron: the small subject of theory, merging and probing experiments."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.linen.layers import Dense, LayerNorm
from flora_jax.models import encoder_layers as encoder

OUTPUTS = ("logits", "features", "layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Hyper-parameters of :class:`MLP`.

    Args:
      sizes: widths from the input to the output, e.g. ``(784, 256, 10)``.
      activation: between the layers, none after the last; one of ``ACTIVATIONS`` or ``identity``
        (a deep linear network).
      norm: ``none`` or ``layer`` (before each activation).
      init_std: deviation of the normal init of the kernels; ``None`` is LeCun normal.
      dtype, param_dtype: of the activations and of the parameters.
    """

    sizes: tuple[int, ...] = (784, 256, 256, 10)
    activation: str = "relu"
    use_bias: bool = True
    norm: str = "none"
    init_std: float | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ConfigError(f"sizes={self.sizes} needs an input and an output width")
        encoder.check_choice("activation", self.activation, (*encoder.ACTIVATIONS, "identity"))
        encoder.check_choice("norm", self.norm, ("none", "layer"))


class MLP(nn.Module):
    """Dense layers ``dense_0 ... head``, an activation between them.

    >>> model = MLP(MLPConfig(sizes=(8, 16, 3)))
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> sorted(variables["params"]), model.apply(variables, jnp.ones((2, 8))).shape
    (['dense_0', 'head'], (2, 3))
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, output: str = "logits") -> jax.Array | list[jax.Array]:
        """``x [..., sizes[0]]`` to ``logits [..., sizes[-1]]`` or to another output.

        Args:
          output: ``logits``, the ``features`` before the head, or ``layers``: the list of every
            layer's output, logits last.

        Raises:
          ConfigError: an input of another width, or an unknown output.
        """
        cfg = self.config
        encoder.check_choice("output", output, OUTPUTS)
        if x.shape[-1] != cfg.sizes[0]:
            raise ConfigError(f"input {x.shape} does not end in sizes[0]={cfg.sizes[0]}")
        act = encoder.ACTIVATIONS.get(cfg.activation, lambda x: x)
        x = x.astype(jnp.dtype(cfg.dtype))
        layers = []
        for i, width in enumerate(cfg.sizes[1:-1]):
            x = self._dense(width, f"dense_{i}")(x)
            if cfg.norm == "layer":
                x = LayerNorm(param_dtype=cfg.param_dtype, name=f"norm_{i}")(x)
            x = act(x)
            layers.append(x)
        logits = self._dense(cfg.sizes[-1], "head")(x)
        return {"logits": logits, "features": x, "layers": [*layers, logits]}[output]

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        return (jnp.zeros((1, self.config.sizes[0])),)

    def _dense(self, features: int, name: str) -> Dense:
        cfg = self.config
        return Dense(
            features,
            cfg.use_bias,
            param_dtype=cfg.param_dtype,
            kernel_init=encoder.kernel_init(cfg.init_std),
            name=name,
        )
