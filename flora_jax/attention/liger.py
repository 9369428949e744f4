"""Liger: a pretrained softmax model as a gated recurrence, without a new parameter (arXiv
2503.01496)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.gla import State, init_matrix, recur
from flora_jax.attention.masks import CAUSAL, Causal, Mask, Sliding
from flora_jax.attention.softmax import Softmax
from flora_jax.attention.types import Call, Sizes, Variant
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.registry import register
from flora_jax.kernels.hybrid_attention import hybrid_attention

FORMS = ("gla", "hgrn2")
NO_DECAY = 1e4
"""Of a key's channel: ``logsigmoid`` is 0."""


@register(
    "Liger",
    family="attention",
    paper="Liger: Linearizing Large Language Models to Gated Recurrent Structures",
    arxiv="2503.01496",
    parameters="0",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Liger(Variant):
    """``w_0 softmax over the last window keys + w_1 gated linear attention over all``.

    The gate is made of the keys, so that every weight of a softmax model keeps its meaning and
    LoRA on the projections is enough to recover it:

    - ``gla``: ``q' = softmax(q)``, ``k' = softmax(k)`` over the channels, log-gate
      ``logsigmoid(k) / normaliser``;
    - ``hgrn2``: ``q' = softmax(q)``, ``k' = 1 - sigmoid(k)``, log-gate ``logsigmoid(k)``;

    ``S_t = diag(gate_t) S_(t-1) + k'_t^T v_t``, ``o_t = q'_t S_t``, no scale and no normaliser, on
    queries and keys before the rotation; the window's softmax is on the rotated ones. The paper
    pools the keys to make the gate; in the official code the pool's width is that of the keys, so
    that it is the identity, and so it is here. The official window holds 64 or 65 keys, by the
    version of its attention library: here it holds ``window``, the query's own included.

    The state is a ring of ``window`` keys and values and ``S [B, K, H, H]`` in float32, one for
    all query heads of a key head.

    Args:
      form: ``gla`` or ``hgrn2``.
      window: keys of the softmax part.
      weights: of the window's softmax and of the recurrence; (0, 1) is the recurrence alone.
      normaliser: of the log-gate of ``gla``.
      chunk: tokens of a chunk, a power of two; None: the kernel's own choice.

    >>> Liger().init(jax.random.key(0), Sizes(heads=4, kv_heads=2, dim=8, width=32), jnp.float32)
    {}
    """

    masks: ClassVar = (Causal,)
    takes: ClassVar = ("segment_ids", "valid", "scale")
    needs: ClassVar = ("q", "k")

    form: str = "gla"
    window: int = 64
    weights: tuple[float, float] = (0.5, 0.5)
    normaliser: float = 16.0
    chunk: int | None = None

    def __post_init__(self):
        if self.form not in FORMS:
            raise ConfigError(unknown("form of Liger", self.form, FORMS))
        if self.window < 1 or self.normaliser <= 0:
            raise ConfigError(
                f"Liger: window {self.window} and normaliser {self.normaliser} must be > 0"
            )
        if len(self.weights) != 2 or not any(self.weights):
            raise ConfigError(f"Liger: weights are of window and recurrence, not {self.weights}")

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> State:
        state = init_matrix(sizes, batch) if self.weights[1] else {}
        if self.weights[0]:
            state |= Softmax().init_state(sizes, batch, max_len, dtype, Sliding(self.window))
        return state

    def whole(self, params, q, k, v, call):
        if all(self.weights) and call.valid is None and call.segment_ids is None:
            return hybrid_attention(
                q,
                k,
                v,
                call.inputs.q,
                call.inputs.k,
                features=self.features,
                window=self.window,
                weights=self.weights,
                scale=call.scale,
                chunk=self.chunk,
            )
        return self._mix(q, k, v, None, call)[0]

    def extend(self, params, q, k, v, state, call):
        return self._mix(q, k, v, state, call)

    def features(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``q'``, ``k'`` and the log-gate in float32, from queries and keys before rotation."""
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        if self.form == "hgrn2":
            return jax.nn.softmax(q), jax.nn.sigmoid(-k), jax.nn.log_sigmoid(k)
        return jax.nn.softmax(q), jax.nn.softmax(k), jax.nn.log_sigmoid(k) / self.normaliser

    def _mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, state: State | None, call: Call
    ) -> tuple[jax.Array, State]:
        """A part of weight 0 is not computed and has no state."""
        out, new = 0.0, {}
        if self.weights[0]:
            near = dataclasses.replace(call, mask=Sliding(self.window))
            if state is None:
                part = Softmax().whole({}, q, k, v, near)
            else:
                ring = {name: state[name] for name in ("k", "v")}
                part, new = Softmax().extend({}, q, k, v, ring, near)
            out = out + self.weights[0] * part.astype(jnp.float32)
        if self.weights[1]:
            far, matrix = recur(
                call.inputs.q,
                call.inputs.k,
                v,
                None,
                state,
                call,
                scale=1.0,
                chunk=self.chunk,
                features=self.features,
                gone=NO_DECAY,
            )
            out = out + self.weights[1] * far.astype(jnp.float32)
            new = {**new, **matrix}
        return out.astype(q.dtype), new
