"""The diffusion transformer, DiT (arXiv 2212.09748): a ViT whose norms follow time and class.

Component names are those of ``models/vit.py`` where it has them, so that the same path rules fit
both: ``layers/attention/attention/query/kernel [L,D,D]``, ``layers/attention/output/dense/kernel``,
``layers/mlp/fc1/kernel [L,D,F]``; besides ``layers/modulation/kernel [L,D,6D]``,
``x_embedder/projection/kernel [P,P,C,D]``, ``t_embedder/fc1``, ``t_embedder/fc2``,
``y_embedder/embedding [classes+1,D]``, ``final_layer/modulation``, ``final_layer/linear``.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.linen.layers import Conv, Dense, Embed
from flora_jax.models import encoder_layers as encoder
from flora_jax.models.dit_config import DiTConfig
from flora_jax.models.encoder_layers import Mode

_XAVIER = nn.initializers.xavier_uniform()
_SMALL = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros_init()


def sinusoid(at: jax.Array, width: int) -> jax.Array:
    """``[sin(p w_m), cos(p w_m)]`` with ``w_m = 10000^(-2m / width)``: ``[...] -> [..., width]``.

    >>> sinusoid(jnp.zeros(3), 4).tolist()[0]
    [0.0, 0.0, 1.0, 1.0]
    """
    half = width // 2
    angle = at[..., None] * jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def grid_positions(height: int, width: int, features: int) -> jax.Array:
    """Fixed embeddings of a grid ``[height * width, features]``: half for the column, half the row.

    >>> grid_positions(2, 3, 8).shape
    (6, 8)
    """
    row, column = jnp.divmod(jnp.arange(height * width), width)
    return jnp.concatenate([sinusoid(p, features // 2) for p in (column, row)], axis=-1)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale[:, None]) + shift[:, None]


def _normalise(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm without parameters, in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)


def _dense(cfg: DiTConfig, features: int, name: str, init: Any = _XAVIER) -> Dense:
    return Dense(features, param_dtype=cfg.param_dtype, kernel_init=init, name=name)


class _Patches(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, images):
        cfg, p = self.config, self.config.patch_size
        patches = (p * p * cfg.num_channels, cfg.hidden_size)
        # The convolution starts as the dense layer over flattened patches that it is.
        init = lambda key, shape, dtype: _XAVIER(key, patches, dtype).reshape(shape)
        how = {"strides": p, "padding": "VALID", "param_dtype": cfg.param_dtype}
        conv = Conv(cfg.hidden_size, (p, p), kernel_init=init, name="projection", **how)
        return conv(images)


class _Time(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, time):
        cfg = self.config
        # DiT's own order is cosines first, its unit the step of a process of 1000.
        wave = jnp.roll(sinusoid(1000 * time, cfg.frequencies), cfg.frequencies // 2, axis=-1)
        x = _dense(cfg, cfg.hidden_size, "fc1", _SMALL)(wave.astype(jnp.dtype(cfg.dtype)))
        return _dense(cfg, cfg.hidden_size, "fc2", _SMALL)(jax.nn.silu(x))


class _Attention(nn.Module):
    config: DiTConfig
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        heads = encoder.SelfAttention(
            cfg.num_attention_heads,
            cfg.qkv_bias,
            0.0,
            _XAVIER,
            cfg.param_dtype,
            False,
            cfg.attention,
            self.grid,
            cfg.projection,
            name="attention",
        )
        out = encoder.AttentionOutput(_XAVIER, cfg.param_dtype, cfg.projection, name="output")
        y, report = heads(x, None)
        return out(y), report


class _MLP(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        how = {"param_dtype": cfg.param_dtype, "kernel_init": _XAVIER}
        dense = lambda f, name: encoder.projection(cfg.projection, f, name=name, **how)
        x = encoder.ACTIVATIONS[cfg.hidden_act](dense(cfg.intermediate_size, "fc1")(x))
        return dense(cfg.hidden_size, "fc2")(x)


class _Layer(nn.Module):
    """``x + g1 Attention(m1(x))``, then ``x + g2 MLP(m2(x))``; every gain g starts at zero."""

    config: DiTConfig
    grid: tuple[int, int]
    mode: Mode

    @nn.compact
    def __call__(self, x, condition):
        cfg = self.config
        numbers = _dense(cfg, 6 * cfg.hidden_size, "modulation", _ZERO)(jax.nn.silu(condition))
        shift1, scale1, gain1, shift2, scale2, gain2 = jnp.split(numbers, 6, axis=-1)
        inside = _modulate(_normalise(x, cfg.layer_norm_eps), shift1, scale1)
        y, report = _Attention(cfg, self.grid, name="attention")(inside)
        x = x + gain1[:, None] * y
        inside = _modulate(_normalise(x, cfg.layer_norm_eps), shift2, scale2)
        x = x + gain2[:, None] * _MLP(cfg, name="mlp")(inside)
        return x, self.mode.kept(x, report)


class _Final(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x, condition, height, width):
        cfg, p = self.config, self.config.patch_size
        numbers = _dense(cfg, 2 * cfg.hidden_size, "modulation", _ZERO)(jax.nn.silu(condition))
        shift, scale = jnp.split(numbers, 2, axis=-1)
        x = _modulate(_normalise(x, cfg.layer_norm_eps), shift, scale)
        x = _dense(cfg, p * p * cfg.out_channels, "linear", _ZERO)(x)
        x = x.reshape(-1, height, width, p, p, cfg.out_channels).swapaxes(2, 3)
        return x.reshape(-1, height * p, width * p, cfg.out_channels)


class DiT(nn.Module):
    """A diffusion transformer over channels-last images with adaLN-zero conditioning.

    A fresh network is zero everywhere, whatever its input: the gains of all blocks and the last
    layer start at zero.

    >>> model = DiT(DiTConfig.tiny())
    >>> images, time, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.zeros(2, int)
    >>> variables = model.init(jax.random.key(0), images, time, labels)
    >>> model.apply(variables, images, time, labels).shape
    (2, 8, 8, 2)
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        labels: jax.Array | None = None,
        *,
        output: str = "prediction",
    ) -> jax.Array:
        """What the noise process asks of noisy ``images [B,H,W,C]``; ``N = H/P * W/P`` tokens.

        Args:
          time: ``[B]``, noise level in [0, 1]: a step of a discrete process over its length.
          labels: ``[B]`` ints up to ``num_classes``, which stands for no class; default none.
          output: ``prediction [B,H,W,out_channels]``; ``layers [L+1,B,N,D]``: the embeddings and
            what each block adds up to; ``reports``: what the layers' attention has to report,
            stacked, None for most variants.

        Raises:
          ConfigError: an unknown output; images or labels that the configuration does not fit.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        self._check(images, labels, output)
        x = _Patches(cfg, name="x_embedder")(images.astype(dtype))
        batch, height, width, d = x.shape
        positions = grid_positions(height, width, d).astype(dtype)
        x = x.reshape(batch, height * width, d) + positions
        condition = _Time(cfg, name="t_embedder")(time)
        if cfg.num_classes:
            if labels is None:
                labels = jnp.full((batch,), cfg.num_classes)
            table = Embed(cfg.num_classes + 1, d, dtype, cfg.param_dtype, name="y_embedder")
            condition = condition + table(labels)
        how = {"remat": cfg.remat, "scan": cfg.scan_layers}
        fields = {"config": cfg, "grid": (height, width), "mode": Mode(collect=output)}
        out, every = encoder.run_layers(
            _Layer, cfg.num_hidden_layers, x, condition, **how, **fields
        )
        if output == "layers":
            return jnp.concatenate([x[None], every])
        if output == "reports":
            return every
        return _Final(cfg, name="final_layer")(out, condition, height, width)

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        side = self.config.patch_size
        return jnp.zeros((1, side, side, self.config.num_channels)), jnp.zeros(1)

    def _check(self, images, labels, output):
        cfg = self.config
        encoder.check_choice("output", output, ("prediction", "layers", "reports"))
        if images.ndim != 4 or images.shape[-1] != cfg.num_channels:
            raise ConfigError(f"images {images.shape} are not [B,H,W,{cfg.num_channels}]")
        if images.shape[1] % cfg.patch_size or images.shape[2] % cfg.patch_size:
            raise ConfigError(
                f"patch_size={cfg.patch_size} does not divide images of {images.shape[1:3]}"
            )
        if labels is not None and not cfg.num_classes:
            raise ConfigError("labels need num_classes")
