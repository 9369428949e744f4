"""A small convolutional network: VGG-like blocks, pooling, a dense head."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.linen.layers import Conv, Dense, LayerNorm
from flora_jax.models import encoder_layers as encoder

OUTPUTS = ("logits", "features")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Hyper-parameters of :class:`ConvNet`.

    Args:
      image_shape: ``(height, width, channels)`` of the images; other heights and widths fit a
        ``mean`` readout.
      channels: output channels of the convolutions, in order.
      window: side of the square kernels.
      pool_every: a 2x2 max pool after each so many convolutions; 0 for none.
      readout: ``mean`` (over the image) or ``flatten``.
      hidden: widths of dense layers between the readout and the head.
      norm: ``none`` or ``layer`` (over channels, before each activation).
      dtype, param_dtype: of the activations and of the parameters.

    >>> ConvNetConfig(channels=(8, 8), hidden=(32,)).readout
    'mean'
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    channels: tuple[int, ...] = (32, 64, 64)
    num_labels: int = 10
    window: int = 3
    pool_every: int = 1
    readout: str = "mean"
    hidden: tuple[int, ...] = ()
    activation: str = "relu"
    norm: str = "none"
    use_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("image_shape", "channels", "hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        encoder.check_choice("readout", self.readout, ("mean", "flatten"))
        encoder.check_choice("norm", self.norm, ("none", "layer"))
        encoder.check_choice("activation", self.activation, encoder.ACTIVATIONS)
        if not self.channels:
            raise ConfigError("channels=() holds no convolution; use an MLP")


class ConvNet(nn.Module):
    """Convolutions ``conv_0 ...``, dense layers ``dense_0 ...`` and the ``head``.

    >>> model = ConvNet(ConvNetConfig(image_shape=(8, 8, 1), channels=(4, 8)))
    >>> images = jnp.ones((2, 8, 8, 1))
    >>> variables = model.init(jax.random.key(0), images)
    >>> variables["params"]["conv_1"]["kernel"].shape, model.apply(variables, images).shape
    ((3, 3, 4, 8), (2, 10))
    """

    config: ConvNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, output: str = "logits") -> jax.Array:
        """``images [B,H,W,C]`` to ``logits [B,labels]``, or to the ``features`` before the head.

        Raises:
          ConfigError: an unknown output, images of another shape or too small for the pooling.
        """
        cfg = self.config
        encoder.check_choice("output", output, OUTPUTS)
        shape = images.shape[1:]
        if shape != cfg.image_shape and (
            cfg.readout == "flatten" or shape[-1] != cfg.image_shape[-1]
        ):
            raise ConfigError(f"images {images.shape} are not [B, *{cfg.image_shape}]")
        x = images.astype(jnp.dtype(cfg.dtype))
        for i, channels in enumerate(cfg.channels):
            x = self._activate(self._conv(channels, f"conv_{i}")(x), f"conv_norm_{i}")
            if cfg.pool_every and (i + 1) % cfg.pool_every == 0:
                if min(x.shape[1:3]) < 2:
                    raise ConfigError(f"nothing is left to pool after conv_{i}: {x.shape[1:3]}")
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.mean(axis=(1, 2)) if cfg.readout == "mean" else x.reshape(x.shape[0], -1)
        for i, width in enumerate(cfg.hidden):
            x = self._activate(self._dense(width, f"dense_{i}")(x), f"dense_norm_{i}")
        logits = self._dense(cfg.num_labels, "head")(x)
        return logits if output == "logits" else x

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        return (jnp.zeros((1, *self.config.image_shape)),)

    def _conv(self, features: int, name: str) -> Conv:
        cfg = self.config
        window = (cfg.window, cfg.window)
        kw = {"use_bias": cfg.use_bias, "param_dtype": cfg.param_dtype}
        return Conv(features, window, **kw, name=name)

    def _dense(self, features: int, name: str) -> Dense:
        cfg = self.config
        return Dense(features, cfg.use_bias, param_dtype=cfg.param_dtype, name=name)

    def _activate(self, x: jax.Array, norm: str) -> jax.Array:
        if self.config.norm == "layer":
            x = LayerNorm(param_dtype=self.config.param_dtype, name=norm)(x)
        return encoder.ACTIVATIONS[self.config.activation](x)
