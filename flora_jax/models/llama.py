"""The Llama family of decoders: pre-norm blocks, rotary grouped-query attention, gated MLP.

``h = h + o(attend(rope(q(n1 h)), rope(k(n1 h)), v(n1 h)))``, then
``h = h + down(act(gate(n2 h)) * up(n2 h))``; logits are ``norm(h) E^T`` (tied) or ``norm(h) W``.
Llama 1 (arXiv 2302.13971) to 3, SmolLM2, Mistral (2310.06825), Qwen2 (2407.10671), Qwen3.
Component names are Hugging Face's; the blocks are scanned under ``layers``, so a kernel is
``layers/self_attn/q_proj/kernel [L, in, out]``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention import Causal, Inputs, Mask, Sizes, Sliding
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.linen.attention import FloraAttention
from flora_jax.linen.layers import Dense, Embed, PrefixDense, RMSNorm
from flora_jax.models import registry
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.models.prefix import pair
from flora_jax.models.rope import rotate

OUTPUTS = ("logits", "hidden")
NO_WINDOW = 2**30
_ACT = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def _sizes(c: LlamaConfig) -> Sizes:
    return Sizes(
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        dim=c.head_dim,
        width=c.hidden_size,
    )


def _mask(window: int | jax.Array | None) -> Mask:
    return Causal() if window is None else Sliding(window)


class Attention(nn.Module):
    """Projections, rotation, the attention variant and its state."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, window: Any, shared: dict[str, Any]):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def dense(features: int, *, layer: type[Dense] = Dense, **fields: Any) -> Dense:
            dtype = jnp.dtype(c.param_dtype)
            return layer(features, kernel_init=init, param_dtype=dtype, **fields)

        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project(name: str) -> tuple[jax.Array, Any]:
            own = dense(kv_heads * dim, use_bias=c.qkv_bias, name=name, layer=PrefixDense)
            y, entries = own(x)
            return y.reshape(*y.shape[:-1], kv_heads, dim), entries

        q = dense(heads * dim, use_bias=c.qkv_bias, name="q_proj")(x)
        q = q.reshape(*q.shape[:-1], heads, dim)
        (k, k_prefix), (v, v_prefix) = project("k_proj"), project("v_proj")
        before = pair(self, k_prefix, v_prefix, kv_heads)
        if c.qk_norm:
            norm = partial(RMSNorm, c.rms_norm_eps, param_dtype=jnp.dtype(c.param_dtype))
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        turn = partial(rotate, cos=shared["cos"], sin=shared["sin"])
        core = FloraAttention(c.attention, _sizes(c), c.param_dtype, name="attention")
        y, state = core(
            turn(q),
            turn(k),
            v,
            mask=_mask(window),
            mode="train" if state is None else "decode" if x.shape[1] == 1 else "prefill",
            state=state,
            positions=None if state is None else shared["positions"],
            segment_ids=shared["segment_ids"],
            valid=shared["valid"],
            prefix=before,
            inputs=Inputs(x=x, q=q, k=k, rotate=turn),
        )
        y = y.reshape(*y.shape[:-2], heads * dim)
        return dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(y), state


class MLP(nn.Module):
    """``down(act(gate x) * up x)``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = partial(
            Dense,
            use_bias=c.mlp_bias,
            kernel_init=nn.initializers.normal(c.initializer_range),
            param_dtype=jnp.dtype(c.param_dtype),
        )
        gate = dense(c.intermediate_size, name="gate_proj")(x)
        up = dense(c.intermediate_size, name="up_proj")(x)
        return dense(c.hidden_size, name="down_proj")(_ACT[c.hidden_act](gate) * up)


class Block(nn.Module):
    """One decoder layer; the carry is the residual stream ``[B, T, D]``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, window: Any, shared: dict[str, Any]):
        c = self.config
        norm = partial(RMSNorm, c.rms_norm_eps, param_dtype=jnp.dtype(c.param_dtype))
        attention = Attention(c, name="self_attn")
        y, cache = attention(norm(name="input_layernorm")(x), cache, window, shared)
        x = x + y
        return x + MLP(c, name="mlp")(norm(name="post_attention_layernorm")(x)), cache


class Llama(nn.Module):
    """A causal language model of the family.

    Args:
      config: the architecture and the numeric policy.

    >>> model = Llama(LlamaConfig.tiny())
    >>> params = registry.init(model, jax.random.key(0))
    >>> params["layers"]["self_attn"]["k_proj"]["kernel"].shape
    (2, 64, 32)
    >>> model.apply({"params": params}, jnp.ones((3, 5), jnp.int32))[0].shape
    (3, 5, 256)
    """

    config: LlamaConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = Embed(
            c.vocab_size, c.hidden_size, jnp.dtype(c.dtype), dtype, embedding_init=init
        )
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        if c.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0 if c.mixed_windows else nn.broadcast, nn.broadcast),
                length=c.num_hidden_layers,
            )
            self.layers = scanned(c)
        else:
            self.layers = [block(c) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps, param_dtype=dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(
                c.vocab_size, use_bias=False, kernel_init=init, param_dtype=dtype
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
        output: str = "logits",
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """``tokens [B, T] -> (logits [B, T, V] or hidden [B, T, D], cache)``.

        Args:
          positions: ``[B, T]``; 0, 1, 2 ... by default. With a cache a row counts on from where its
            cache ends.
          segment_ids: ``[B, T]`` of packed sequences; a token sees its own segment and segment -1.
          cache: of :meth:`init_cache`, the state of the attention; returned with these tokens.
            Without one, the second result is what the layers' attention has to report, if at all.
          output: ``hidden`` stops before the head (see :meth:`head`).
          valid: ``[B, T]``, false for padding, which does not enter the cache: with a cache at the
            end of a row.

        Raises:
          ConfigError: an unknown output, or a cache together with segments.
        """
        c = self.config
        if output not in OUTPUTS:
            raise ConfigError(unknown("output", output, OUTPUTS))
        if cache is not None and segment_ids is not None:
            raise ConfigError("a cache holds one sequence per row: segment_ids must be None")
        counted = jnp.arange(tokens.shape[1])[None]
        given = counted if positions is None else positions
        # Behind an attention prefix the first token has position P; the cache does not hold it.
        start = ops.prefix_start(self.variables.get("params", {}))
        cos, sin = c.rope.angles(given + start, c.head_dim)
        shared = {
            "cos": cos,
            "sin": sin,
            "positions": jnp.broadcast_to(given, tokens.shape),
            "segment_ids": segment_ids,
            "valid": valid,
        }
        x, cache = self._blocks(self.embed_tokens(tokens), cache, shared)
        x = self.norm(x)
        return (self.head(x) if output == "logits" else x), cache

    @property
    def _window(self) -> int | None:
        """The window of every layer, where they are alike."""
        c = self.config
        return None if c.sliding_layers and not any(c.sliding_layers) else c.sliding_window

    def _blocks(self, x: jax.Array, cache: Any, shared: dict[str, Any]) -> tuple[jax.Array, Any]:
        c = self.config
        if c.scan_layers:
            window = self._window
            if c.mixed_windows:
                window = jnp.asarray([w or NO_WINDOW for w in c.windows])
            return self.layers(x, cache, window, shared)
        new = []
        for i, layer in enumerate(self.layers):
            x, one = layer(x, jax.tree.map(lambda a, i=i: a[i], cache), c.windows[i], shared)
            new.append(one)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *new)

    def head(self, hidden: jax.Array) -> jax.Array:
        """``hidden [..., D] -> logits [..., V]``."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def init_cache(self, batch: int, max_len: int, dtype: Any = None) -> Any:
        """An empty cache: the state of the attention variant, with a leading layer axis."""
        c = self.config
        mask = _mask(None if c.mixed_windows else self._window)
        one = c.attention.init_state(_sizes(c), batch, max_len, jnp.dtype(dtype or c.dtype), mask)
        layers = c.num_hidden_layers
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *a.shape)), one)

    def to_hf(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return self.config.to_hf()

    def dummy_inputs(self) -> tuple[jax.Array]:
        """The smallest arguments of ``init``."""
        return (jnp.zeros((1, 1), jnp.int32),)


@registry.register("llama", "mistral", "qwen2", "qwen3")
def _build(config: dict[str, Any], **options: Any) -> Llama:
    return Llama(LlamaConfig.from_hf(config, **options))
