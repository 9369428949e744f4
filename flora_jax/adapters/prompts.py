"""Prompt tuning and prefix tuning: trained tokens, and trained entries of every attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import Adapter, PrefixAdapter, output_sizes
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import LinearMap, operator, static
from flora_jax.core.registry import register


@operator
class Zero(LinearMap):
    """``M = 0`` of size ``[n_in, n_out]``."""

    n_in: int = static()
    n_out: int = static()

    def then(self, y):
        return jnp.zeros((*y.shape[:-1], self.n_out), y.dtype)

    def dense(self):
        return jnp.zeros((self.n_in, self.n_out))

    @property
    def T(self):
        return Zero(self.n_out, self.n_in)

    def flops(self):
        return 0


@operator
class VirtualRows(LinearMap):
    """Rows ``[P, d]`` after the last of a table ``[V, d]``: id ``V + i`` gives row i, others 0.

    The table's own part is zero, so a tied head keeps its V outputs. An id past the rows gives NaN.
    """

    rows: jax.Array
    vocabulary: int = static()

    def apply(self, inputs):
        index = inputs.z - self.vocabulary
        found = jnp.take(self.rows, jnp.maximum(index, 0), axis=0, mode="fill", fill_value=jnp.nan)
        return jnp.where(index[..., None] < 0, 0.0, found).astype(inputs.how.dtype)

    def dense(self):
        return self.T.T.dense()

    @property
    def T(self):
        return Zero(self.rows.shape[-1], self.vocabulary)

    def flops(self):
        return 0


@register(
    "PromptTuning",
    family="adapter",
    paper="The Power of Scale for Parameter-Efficient Prompt Tuning",
    arxiv="2104.08691",
    parameters="P out",
    mergeable=False,
    peft="PROMPT_TUNING",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Adapter):
    """P trained embeddings before the tokens of every text; on the embedding table ``[V, d]``.

    Virtual token i has the id ``V + i``; its embedding is row i of ``prompt [P, d]`` (float32). A
    tied head keeps its V outputs. ``CausalLM``, ``Classification`` and ``generate`` put the ids
    before the tokens themselves (:func:`flora_jax.data.with_prompt`); elsewhere take them from
    :func:`flora_jax.core.ops.virtual_rows`. Positions count the prompt, as in HF PEFT; in a row of
    packed texts every text sees the prompt and starts at position P.

    Args:
      tokens: P.
      init_from: ``random`` (N(0, 1), HF PEFT's default), ``vocabulary`` (rows of the table drawn at
        random, the paper's second choice) or ``text`` (the rows of ``ids``, repeated or cut to P).
      ids: token ids for ``text``.
      text: what ``flora train`` makes into ids with the model's tokenizer.

    A prompt changes the output from the start: there is no identity. Not mergeable.
    Source: arXiv 2104.08691; inits as in HF PEFT ``tuners/prompt_tuning``.

    >>> import flora_jax as flora
    >>> params = {"embed_tokens": {"embedding": jnp.zeros((100, 8))}}
    >>> flora.plan(params, {"embed_tokens/embedding": PromptTuning(tokens=5)}).count
    40
    """

    tokens: int = 20
    init_from: str = "random"
    ids: tuple[int, ...] = ()
    text: str = ""

    kinds = ("embedding",)
    dim_names = {"prompt": (None, "out")}

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether the start is made of the table's rows."""
        return self.init_from != "random"

    def virtual_rows(self):
        return self.tokens

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.tokens < 1:
            raise PlanError(f"tokens={self.tokens} must be at least 1")
        if self.init_from not in ("random", "vocabulary", "text"):
            raise PlanError(f"init_from={self.init_from!r} is not random, vocabulary or text")
        if self.init_from == "text" and not self.ids:
            raise PlanError(
                "init_from='text' needs ids=tokenizer.encode(text) (flora train finds them itself)"
            )
        outside = [i for i in self.ids if not 0 <= i < shape[0]]
        if outside:
            raise PlanError(f"id {outside[0]} is outside the table of {shape[0]} rows")

    def init(self, key, spec, base):
        vocabulary, d = base.shape
        if self.init_from == "random":
            return {"prompt": jax.random.normal(key, (self.tokens, d))}, {}
        if self.init_from == "text":
            ids = jnp.resize(jnp.array(self.ids), (self.tokens,))
        else:
            ids = jax.random.randint(key, (self.tokens,), 0, vocabulary)
        return {"prompt": base[ids].astype(jnp.float32)}, {}

    def operator(self, params, spec, ctx):
        return ctx.base + VirtualRows(params["prompt"], ctx.shape[0])


@register(
    "PrefixTuning",
    family="adapter",
    paper="Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    arxiv="2101.00190",
    parameters="P out; h out + out, + P out + h(out + 1) once with projection h",
    mergeable=False,
    peft="PREFIX_TUNING",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixAdapter):
    """P trained keys and values before those of an attention; on its key and value kernels.

    ``prefix [P, out]`` (float32) is laid out like the projection's output, heads side by side; it
    gets no bias, norm or rotation. Every query sees it, in every segment; positions of the tokens
    start at P. Give it to ``k_proj`` and ``v_proj`` (``key`` and ``value``) alike; the attentions
    of :mod:`flora_jax.models` read it, anything else raises.

    Args:
      tokens: P.
      init_from: ``random`` (N(0, 1), HF PEFT's) or ``zero`` (zero keys still take their share of
        the attention: not the identity either).
      projection: hidden width h of the paper's reparameterisation while training: ``prefix =
        tanh(E W1 + b1) w + b`` with ``E [P, out]``, ``W1 [out, h]``, ``b1`` shared by all weights
        (``adapters["pool/PrefixTuning"]``) and ``w [h, out]``, ``b`` of each; 0 trains the table.

    Source: arXiv 2101.00190; layout, positions and inits as in HF PEFT ``tuners/prefix_tuning``,
    whose MLP has one hidden layer of tanh. Not mergeable.

    >>> import flora_jax as flora
    >>> params = {"layers": {"k_proj": {"kernel": jnp.zeros((3, 12, 8))}}}
    >>> flora.plan(params, {".*": PrefixTuning(tokens=5)}).count
    120
    """

    init_from: str = "random"
    projection: int = 0

    dim_names = {"prefix": (None, "out"), "w": (None, "out"), "b": ("out",)}

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """Whether the weights share the first layer of the reparameterisation."""
        return self.projection > 0

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.init_from not in ("random", "zero"):
            raise PlanError(f"init_from={self.init_from!r} is not random or zero")
        if self.projection < 0:
            raise PlanError(f"projection={self.projection} must be 0 or more")

    def pool(self, key, entries):
        _, width = output_sizes(entries[0].spec, entries[0].kernel_shape)
        keys = jax.random.split(key, 3)
        return {
            "e": jax.random.normal(keys[0], (self.tokens, width)),
            "w1": kaiming_uniform(keys[1], (width, self.projection), width),
            "b1": kaiming_uniform(keys[2], (self.projection,), width),
        }, {}

    def init(self, key, spec, base):
        _, n_out = output_sizes(spec, base.shape)
        if self.projection:
            shapes = {"w": (self.projection, n_out), "b": (n_out,)}
            keys = dict(zip(shapes, jax.random.split(key)))
            draw = lambda name: kaiming_uniform(keys[name], shapes[name], self.projection)
        else:
            shapes = {"prefix": (self.tokens, n_out)}
            draw = lambda name: jax.random.normal(key, shapes[name])
        zero = self.init_from == "zero"
        return {n: jnp.zeros(s) if zero else draw(n) for n, s in shapes.items()}, {}

    def prefix(self, params, spec, ctx):
        if not self.projection:
            return params["prefix"]
        return self.table(params, ctx.pool)

    def table(self, params, pool) -> jax.Array:
        """The projected table ``[P, out]``: what a trained reparameterisation amounts to."""
        hidden = jnp.tanh(pool["e"] @ pool["w1"] + pool["b1"])
        return hidden @ params["w"] + params["b"]
