"""Vision transformers: the pre-LN ViT (arXiv 2010.11929) and DINOv2's (arXiv 2304.07193).

Component names are those of Hugging Face's DINOv2 files, with the blocks scanned under
``layers``: ``embeddings/patch_embeddings/projection/kernel [P,P,C,D]``,
``layers/attention/attention/query/kernel [L,D,D]``, ``layers/attention/output/dense/kernel``,
``layers/mlp/fc1/kernel [L,D,F]``, ``layers/layer_scale1/lambda1 [L,D]``. A plain ViT has the same
names and no LayerScale; ``flora_jax.io.encoders`` maps both to their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core import ops
from flora_jax.core.errors import ConfigError
from flora_jax.linen.layers import Conv, Dense, LayerNorm, weight
from flora_jax.models import encoder_layers as encoder
from flora_jax.models import registry
from flora_jax.models.encoder_layers import Mode
from flora_jax.models.resize import resize_grid
from flora_jax.models.vit_config import POOLING, ViTConfig

OUTPUTS = ("hidden", "layers", "reports", "logits", *POOLING)


def _dense(cfg: ViTConfig, features: int, name: str) -> Dense:
    init = encoder.kernel_init(cfg.initializer_range)
    return Dense(features, param_dtype=cfg.param_dtype, kernel_init=init, name=name)


class _Projection(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, images):
        cfg = self.config
        conv = Conv(
            cfg.hidden_size,
            (cfg.patch_size, cfg.patch_size),
            strides=cfg.patch_size,
            padding="VALID",
            param_dtype=cfg.param_dtype,
            kernel_init=encoder.kernel_init(cfg.initializer_range),
            name="projection",
        )
        return conv(images)


class _Embeddings(nn.Module):
    config: ViTConfig
    mode: Mode

    @nn.compact
    def __call__(self, images, masked):
        cfg, d, dtype = self.config, self.config.hidden_size, jnp.dtype(self.config.dtype)
        x = _Projection(cfg, name="patch_embeddings")(images.astype(dtype))
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, d)
        if cfg.use_mask_token:
            token = self._vector("mask_token", (1, d), nn.initializers.zeros_init())
            if masked is not None:
                x = jnp.where(masked[..., None], token.astype(dtype), x)
        normal = nn.initializers.normal(cfg.initializer_range or 0.02)
        cls = self._vector("cls_token", (1, 1, d), normal).astype(dtype)
        table = self._vector("position_embeddings", (1, cfg.grid**2 + 1, d), normal)
        grid = resize_grid(table[0, 1:].reshape(cfg.grid, cfg.grid, d), height, width)
        positions = jnp.concatenate([table[0, :1], grid.reshape(height * width, d)])
        x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, d)), x], axis=1)
        x = x + positions.astype(dtype)
        return nn.Dropout(cfg.hidden_dropout_prob, deterministic=not self.mode.train)(x)

    def _vector(self, name, shape, init):
        return ops.value(weight(self, name, init, shape, self.config.param_dtype))


class _Attention(nn.Module):
    config: ViTConfig
    mode: Mode
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        heads = encoder.SelfAttention(
            cfg.num_attention_heads,
            cfg.qkv_bias,
            cfg.attention_probs_dropout_prob,
            encoder.kernel_init(cfg.initializer_range),
            cfg.param_dtype,
            self.mode.train,
            cfg.attention,
            self.grid,
            cfg.projection,
            name="attention",
        )
        init = encoder.kernel_init(cfg.initializer_range)
        out = encoder.AttentionOutput(init, cfg.param_dtype, cfg.projection, name="output")
        y, report = heads(x, None)
        return out(y), report


class _MLP(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        init = encoder.kernel_init(cfg.initializer_range)
        how = {"param_dtype": cfg.param_dtype, "kernel_init": init}
        dense = lambda f, name: encoder.projection(cfg.projection, f, name=name, **how)  # noqa: E731
        if cfg.use_swiglu_ffn:
            gate, up = jnp.split(dense(cfg.intermediate_size, "weights_in")(x), 2, axis=-1)
            return dense(cfg.hidden_size, "weights_out")(jax.nn.silu(gate) * up)
        x = encoder.ACTIVATIONS[cfg.hidden_act](dense(cfg.intermediate_size, "fc1")(x))
        return dense(cfg.hidden_size, "fc2")(x)


class LayerScale(nn.Module):
    """``x * lambda1``: a learned gain per channel at the end of a residual branch (CaiT)."""

    initial: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        gain = weight(self, "lambda1", init, (x.shape[-1],), self.param_dtype)
        return x * ops.value(gain, x.dtype)


class _Layer(nn.Module):
    config: ViTConfig
    mode: Mode
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        attention = _Attention(self.config, self.mode, self.grid, name="attention")
        y, report = attention(self._norm(1)(x))
        x = x + self._branch(y, 1)
        x = x + self._branch(_MLP(self.config, name="mlp")(self._norm(2)(x)), 2)
        return x, self.mode.kept(x, report)

    def _norm(self, number):
        cfg = self.config
        return LayerNorm(cfg.layer_norm_eps, cfg.param_dtype, name=f"norm{number}")

    def _branch(self, x, number):
        cfg, still = self.config, not self.mode.train
        x = nn.Dropout(cfg.hidden_dropout_prob, deterministic=still)(x)
        if cfg.layerscale_value is not None:
            name = f"layer_scale{number}"
            x = LayerScale(cfg.layerscale_value, cfg.param_dtype, name=name)(x)
        # One draw for a whole example: stochastic depth (arXiv 1603.09382).
        return nn.Dropout(cfg.drop_path_rate, broadcast_dims=(1, 2), deterministic=still)(x)


class _Pooler(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, first):
        return jnp.tanh(_dense(self.config, self.config.hidden_size, "dense")(first))


class ViT(nn.Module):
    """A vision transformer over channels-last images, with an optional classification head.

    >>> model = ViT(ViTConfig.tiny())
    >>> images = jnp.ones((2, 8, 8, 1))
    >>> variables = model.init(jax.random.key(0), images)
    >>> model.apply(variables, images).shape
    (2, 10)
    >>> model.apply(variables, jnp.ones((2, 12, 8, 1)), output="hidden").shape
    (2, 25, 64)
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        masked: jax.Array | None = None,
        *,
        output: str | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Encodes ``images [B,H,W,C]``; ``N = H/P * W/P`` patches.

        Args:
          masked: ``[B,N]`` booleans, true where ``mask_token`` takes a patch's place.
          output: ``hidden [B,1+N,D]`` (after the final norm, cls first), ``layers [L+1,B,1+N,D]``
            (embeddings first, before the final norm), ``cls``, ``mean`` or ``pooler`` ``[B,D]``,
            ``cls_mean [B,2D]``, ``logits [B,labels]``, or ``reports``: what the layers'
            attention has to report, stacked, None for most variants. Default: the logits if there
            is a head, else hidden.
          train: dropout and stochastic depth on (needs the ``dropout`` rng if a rate is not zero).

        Raises:
          ConfigError: an unknown output or one without parameters; an image that the patches or
            the channels do not fit.
        """
        cfg = self.config
        output = output or ("logits" if cfg.num_labels else "hidden")
        self._check(images, masked, output)
        mode = Mode(train, output)
        x = _Embeddings(cfg, mode, name="embeddings")(images, masked)
        grid = (images.shape[1] // cfg.patch_size, images.shape[2] // cfg.patch_size)
        how = {"remat": cfg.remat, "scan": cfg.scan_layers}
        fields = {"config": cfg, "mode": mode, "grid": grid}
        hidden, every = encoder.run_layers(_Layer, cfg.num_hidden_layers, x, **how, **fields)
        hidden = LayerNorm(cfg.layer_norm_eps, cfg.param_dtype, name="layernorm")(hidden)
        pooled = self._pool(hidden)
        if cfg.num_labels:
            head = _dense(cfg, cfg.num_labels, "classifier")
            pooled["logits"] = head(pooled[cfg.pooling])
        pooled["reports"] = every
        return jnp.concatenate([x[None], every]) if output == "layers" else pooled[output]

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` of this model."""
        return self.config.to_hf()

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        side = self.config.patch_size
        return (jnp.zeros((1, side, side, self.config.num_channels)),)

    def _pool(self, hidden):
        cls, patches = hidden[:, 0], hidden[:, 1:]
        mean = patches.mean(axis=1, dtype=jnp.float32).astype(hidden.dtype)
        pooled = {"hidden": hidden, "cls": cls, "mean": mean}
        pooled["cls_mean"] = jnp.concatenate([cls, mean], axis=-1)
        if self.config.use_pooler:
            pooled["pooler"] = _Pooler(self.config, name="pooler")(cls)
        return pooled

    def _check(self, images, masked, output):
        cfg = self.config
        encoder.check_choice("output", output, OUTPUTS)
        if output == "logits" and not cfg.num_labels:
            raise ConfigError("output='logits' needs a head: set num_labels")
        if output == "pooler" and not cfg.use_pooler:
            raise ConfigError("output='pooler' needs use_pooler=True")
        if masked is not None and not cfg.use_mask_token:
            raise ConfigError("masked patches need use_mask_token=True")
        if images.ndim != 4 or images.shape[-1] != cfg.num_channels:
            raise ConfigError(f"images {images.shape} are not [B,H,W,{cfg.num_channels}]")
        if images.shape[1] % cfg.patch_size or images.shape[2] % cfg.patch_size:
            raise ConfigError(
                f"patch_size={cfg.patch_size} does not divide images of {images.shape[1:3]}"
            )


@registry.register("vit", "dinov2")
def build(config: Mapping[str, Any], **options: Any) -> ViT:
    """:class:`ViT` for a ``config.json``; options are fields of :class:`ViTConfig`."""
    return ViT(ViTConfig.from_hf(config, **options))
