"""BERT: the post-LN bidirectional encoder (Devlin et al. 2018, arXiv 1810.04805).

Component names are Hugging Face's, with the blocks scanned under ``layers``:
``embeddings/word_embeddings/embedding [V,D]``, ``layers/attention/self/query/kernel [L,D,D]``,
``layers/attention/output/dense/kernel``, ``layers/intermediate/dense/kernel [L,D,F]``,
``layers/output/dense/kernel [L,F,D]``, ``pooler/dense/kernel``, ``classifier/kernel [D,labels]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention import Softmax, Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.linen.layers import Dense, Embed, LayerNorm
from flora_jax.models import encoder_layers as encoder
from flora_jax.models import registry
from flora_jax.models.attention_config import read_attention, write_attention
from flora_jax.models.encoder_layers import Mode

POOLING = ("pooler", "mean", "cls")
OUTPUTS = ("hidden", "layers", "reports", "logits", *POOLING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Hyper-parameters of :class:`Bert`; the field names are Hugging Face's where it has them.

    Args:
      num_labels: width of the classification head ``classifier``; 0 for none.
      pooling: what the head reads: ``pooler`` (tanh layer on the first token), ``mean`` (over
        tokens) or ``cls`` (the first token as it is).
      use_pooler: whether the parameters hold the pooler; ``pooling="pooler"`` needs it.
      attention: the variant that every layer has.
      dtype, param_dtype: of the activations and of the parameters.
      scan_layers: one scanned component ``layers`` or components ``layers_0``, ``layers_1`` ...
      remat: what the backward pass recomputes: ``none``, ``full`` (all of a block), ``dots``
        (all but products), ``dots_no_batch`` (all but products with a weight).

    >>> BertConfig.tiny(num_labels=3).hidden_size
    32
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    num_labels: int = 0
    pooling: str = "pooler"
    use_pooler: bool = True
    attention: Variant = Softmax()
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        encoder.check_heads(self.hidden_size, self.num_attention_heads)
        encoder.check_choice("hidden_act", self.hidden_act, encoder.ACTIVATIONS)
        encoder.check_choice("pooling", self.pooling, POOLING)
        encoder.check_choice("remat", self.remat, encoder.REMAT)
        if self.num_labels and self.pooling == "pooler" and not self.use_pooler:
            raise ConfigError("pooling='pooler' needs use_pooler=True; or pool by 'mean' or 'cls'")

    @classmethod
    def tiny(cls, **changes: Any) -> BertConfig:
        """Two layers of width 32 over 100 tokens: for tests and examples."""
        sizes = {
            "vocab_size": 100,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 40,
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **changes: Any) -> BertConfig:
        """From a Hugging Face ``config.json``; ``changes`` override.

        Dropout is off unless asked for by ``changes``: adapters are usually trained without.

        Raises:
          ConfigError: not a BERT encoder with absolute positions.

        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 384}).hidden_size
        384
        """
        if config.get("model_type") != "bert":
            raise ConfigError(f"model_type {config.get('model_type')!r} is not 'bert'")
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute" or config.get("is_decoder"):
            raise ConfigError(
                f"a BERT with position_embedding_type={positions!r} and "
                f"is_decoder={config.get('is_decoder', False)} is not supported; only the encoder "
                "with absolute positions is"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        names -= {"hidden_dropout_prob", "attention_probs_dropout_prob", *encoder.POLICY}
        values = {name: config[name] for name in names if name in config}
        values["num_labels"] = encoder.read_labels(config)
        values |= read_attention(config)
        if "BertForMaskedLM" in (config.get("architectures") or ()):
            values.setdefault("use_pooler", False)
        return cls(**(values | changes))

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` of this model; :meth:`from_hf` reads it back."""
        ours = {"num_labels", "pooling", "use_pooler", "attention", *encoder.POLICY}
        data = {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}
        data |= write_attention(self.attention)
        kind = "BertForSequenceClassification" if self.num_labels else "BertModel"
        data |= {"model_type": "bert", "architectures": [kind]}
        if self.num_labels:
            data |= encoder.write_labels(self.num_labels)
        if self.pooling != "pooler":
            data["pooling"] = self.pooling
        if not self.use_pooler:
            data["use_pooler"] = False
        return data


def _dense(cfg: BertConfig, features: int, name: str) -> Dense:
    init = encoder.kernel_init(cfg.initializer_range)
    return Dense(features, param_dtype=cfg.param_dtype, kernel_init=init, name=name)


def _norm(cfg: BertConfig) -> LayerNorm:
    return LayerNorm(cfg.layer_norm_eps, cfg.param_dtype, name="LayerNorm")


def _dropout(cfg: BertConfig, mode: Mode) -> nn.Dropout:
    return nn.Dropout(cfg.hidden_dropout_prob, deterministic=not mode.train)


class _Embeddings(nn.Module):
    config: BertConfig
    mode: Mode

    @nn.compact
    def __call__(self, tokens, positions, token_types):
        cfg, mode = self.config, self.mode

        def table(size: int, name: str) -> Embed:
            init = encoder.kernel_init(cfg.initializer_range)
            return Embed(
                size, cfg.hidden_size, jnp.dtype(cfg.dtype), cfg.param_dtype, init, name=name
            )

        x = table(cfg.vocab_size, "word_embeddings")(tokens)
        x = x + table(cfg.type_vocab_size, "token_type_embeddings")(token_types)
        x = x + table(cfg.max_position_embeddings, "position_embeddings")(positions)
        return _dropout(cfg, mode)(_norm(cfg)(x))


class _Output(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``: the end of both halves of a block."""

    config: BertConfig
    mode: Mode

    @nn.compact
    def __call__(self, x, residual):
        cfg, mode = self.config, self.mode
        x = _dropout(cfg, mode)(_dense(cfg, cfg.hidden_size, "dense")(x))
        return _norm(cfg)(x + residual)


class _Attention(nn.Module):
    config: BertConfig
    mode: Mode

    @nn.compact
    def __call__(self, x, mask):
        cfg = self.config
        heads = encoder.SelfAttention(
            cfg.num_attention_heads,
            True,
            cfg.attention_probs_dropout_prob,
            encoder.kernel_init(cfg.initializer_range),
            cfg.param_dtype,
            self.mode.train,
            cfg.attention,
            name="self",
        )
        out, report = heads(x, mask)
        return _Output(cfg, self.mode, name="output")(out, x), report


class _Intermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        x = _dense(cfg, cfg.intermediate_size, "dense")(x)
        return encoder.ACTIVATIONS[cfg.hidden_act](x)


class _Layer(nn.Module):
    config: BertConfig
    mode: Mode

    @nn.compact
    def __call__(self, x, mask):
        x, report = _Attention(self.config, self.mode, name="attention")(x, mask)
        wide = _Intermediate(self.config, name="intermediate")(x)
        x = _Output(self.config, self.mode, name="output")(wide, x)
        return x, self.mode.kept(x, report)


class _Pooler(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, first):
        return jnp.tanh(_dense(self.config, self.config.hidden_size, "dense")(first))


def mean_pool(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean of ``hidden [B,T,D]`` over the tokens of ``mask [B,T]``, in float32.

    >>> mean_pool(jnp.asarray([[[1.0], [3.0], [9.0]]]), jnp.asarray([[1, 1, 0]])).tolist()
    [[2.0]]
    """
    wide = hidden.astype(jnp.float32)
    if mask is None:
        return wide.mean(axis=1).astype(hidden.dtype)
    keep = mask.astype(jnp.float32)[..., None]
    total = jnp.maximum(keep.sum(axis=1), 1.0)
    return ((wide * keep).sum(axis=1) / total).astype(hidden.dtype)


class Bert(nn.Module):
    """The BERT encoder with an optional pooler and classification head.

    >>> model = Bert(BertConfig.tiny(num_labels=3))
    >>> tokens = jnp.ones((2, 7), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape, model.apply(variables, tokens, output="hidden").shape
    ((2, 3), (2, 7, 32))
    >>> variables["params"]["layers"]["attention"]["self"]["query"]["kernel"].shape
    (2, 32, 32)
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        output: str | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Encodes ``tokens [B,T]``.

        Args:
          mask: ``[B,T]``, 1 for a token and 0 for padding.
          token_types: ``[B,T]`` segment ids; zeros if not given.
          positions: ``[B,T]`` or ``[T]``; ``0..T-1`` if not given.
          output: ``hidden [B,T,D]``, ``layers [L+1,B,T,D]`` (embeddings first), ``pooler``,
            ``mean`` or ``cls`` ``[B,D]``, ``logits [B,labels]``, or ``reports``: what the
            layers' attention has to report, stacked, None for most variants. Default: the logits
            if there is a head, else hidden.
          train: dropout on (needs the ``dropout`` rng if a rate is not zero).

        Raises:
          ConfigError: an unknown output, or one that this configuration has no parameters for.
          StructureError: more tokens than positions.
        """
        cfg = self.config
        output = output or ("logits" if cfg.num_labels else "hidden")
        self._check(tokens, output)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        # Behind an attention prefix the first token has position P, as in HF PEFT.
        start = ops.prefix_start(self.variables.get("params", {}))
        self._check_length(tokens, start)
        positions = positions + start
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        mode = Mode(train, output)
        x = _Embeddings(cfg, mode, name="embeddings")(tokens, positions, token_types)
        how = {"remat": cfg.remat, "scan": cfg.scan_layers}
        hidden, every = encoder.run_layers(
            _Layer, cfg.num_hidden_layers, x, mask, **how, config=cfg, mode=mode
        )
        pooled = {"hidden": hidden, "mean": mean_pool(hidden, mask), "cls": hidden[:, 0]}
        if cfg.use_pooler:
            pooled["pooler"] = _Pooler(cfg, name="pooler")(hidden[:, 0])
        if cfg.num_labels:
            features = _dropout(cfg, mode)(pooled[cfg.pooling])
            pooled["logits"] = _dense(cfg, cfg.num_labels, "classifier")(features)
        pooled["reports"] = every
        return jnp.concatenate([x[None], every]) if output == "layers" else pooled[output]

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` of this model."""
        return self.config.to_hf()

    def dummy_inputs(self) -> tuple[jax.Array, ...]:
        """The smallest arguments that ``init`` takes."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def _check(self, tokens: jax.Array, output: str) -> None:
        cfg = self.config
        encoder.check_choice("output", output, OUTPUTS)
        if output == "logits" and not cfg.num_labels:
            raise ConfigError("output='logits' needs a head: set num_labels")
        if output == "pooler" and not cfg.use_pooler:
            raise ConfigError("output='pooler' needs use_pooler=True")

    def _check_length(self, tokens: jax.Array, start: Any) -> None:
        # Rows with prefixes of their own lengths have a traced start; past the table lies NaN.
        start = start if isinstance(start, int) else 0
        if tokens.shape[1] + start > self.config.max_position_embeddings:
            behind = f" behind a prefix of {start}" if start else ""
            raise StructureError(
                f"{tokens.shape[1]} tokens{behind}, but the position table holds "
                f"{self.config.max_position_embeddings}"
            )


@registry.register("bert")
def build(config: Mapping[str, Any], **options: Any) -> Bert:
    """:class:`Bert` for a ``config.json``; options are fields of :class:`BertConfig`."""
    return Bert(BertConfig.from_hf(config, **options))
