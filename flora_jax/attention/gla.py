"""Gated linear attention as an attention variant (Yang et al. 2023, arXiv 2312.06635)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.masks import CAUSAL, Causal, Mask
from flora_jax.attention.types import Call, Sizes, Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError
from flora_jax.core.registry import register
from flora_jax.kernels.gated_linear_attention import Features, gated_linear_attention

State = dict[str, jax.Array]


def init_matrix(sizes: Sizes, batch: int) -> State:
    """``S [B, K, H, H]`` of no tokens, float32."""
    return {"S": jnp.zeros((batch, sizes.kv_heads, sizes.dim, sizes.dim), jnp.float32)}


def recur(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    state: State | None,
    call: Call,
    *,
    scale: float,
    chunk: int | None,
    features: Features | None = None,
    gone: float = 0.0,
) -> tuple[jax.Array, State]:
    """``S_t = diag(e^(l_t)) S_(t-1) + k_t^T v_t``, ``o_t = scale q_t S_t`` under a call's padding
    and segments.

    Padding neither decays the state nor enters it. A segment starts from the state behind the
    tokens of segment -1 at the start of its row (a trained prompt's), which is zero without any.

    Args:
      q: ``[B, T, N, H]``; k, v, log_decay: ``[B, T, K, H]``.
      state: ``{"S": [B, K, H, H]}``, or None for zero.
      features: of the op, instead of log_decay.
      gone: the value of a key's channels whose features do not decay the state.
    """
    if call.valid is not None:
        there = call.valid.astype(bool)[..., None, None]
        k, v = jnp.where(there, k, jnp.asarray(gone, k.dtype)), jnp.where(there, v, 0)
        log_decay = None if log_decay is None else jnp.where(there, log_decay, 0)
    if features is not None and call.segment_ids is not None:
        q, k, log_decay = features(q.astype(jnp.float32), k.astype(jnp.float32))
        v, features = v.astype(jnp.float32), None
    out, last = gated_linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=None if state is None else state["S"],
        scale=scale,
        segment_ids=call.segment_ids,
        chunk=chunk,
        features=features,
    )
    if call.segment_ids is not None:
        shared = jnp.cumprod(call.segment_ids == -1, axis=1).astype(bool)
        out = out + jax.lax.cond(
            shared.any(),
            lambda: scale * _behind_shared(q, k, v, log_decay, shared, call.segment_ids),
            lambda: jnp.zeros_like(out),
        )
    return out, {"S": last}


def _behind_shared(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    shared: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    """What tokens read from the shared tokens ``[B, T]`` at their row's start: ``q_t e^(b_t) S``
    with b the decay since the token's segment began; zero for the shared tokens themselves."""
    mine = shared[..., None, None]
    later = jnp.where(mine, log_decay, 0)
    later = jnp.cumsum(later[:, ::-1], axis=1)[:, ::-1] - later
    keys = jnp.where(mine, k * jnp.exp(later), 0)
    state = jnp.einsum("btkd,btkv->bkdv", keys, v)
    through = jnp.cumsum(log_decay, axis=1)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    place = jax.lax.cummax(jnp.where(first, jnp.arange(segments.shape[1]), 0), axis=1)
    since = through - jnp.take_along_axis(through - log_decay, place[..., None, None], axis=1)
    decay = jnp.where(mine, 0, jnp.exp(since))
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, dim) * decay[:, :, :, None]
    out = jnp.einsum("btkgd,bkdv->btkgv", q, state)
    return out.reshape(batch, length, heads, v.shape[-1])


@register(
    "GLA",
    family="attention",
    paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
    arxiv="2312.06635",
    parameters="r (C + K H) + K H + H + C N H",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GLA(Variant):
    """``S_t = diag(a_t) S_(t-1) + k_t^T v_t``, ``y_t = norm(q_t S_t / sqrt(H)) * silu(x_t W_g)``
    with ``a_t = sigmoid(x_t W_1 W_2 + b)^(1 / normaliser)`` per key channel.

    Queries and keys are those before the rotation; no softmax, no normaliser, no growing cache:
    the state is ``S [B, K, H, H]`` in float32. A key head keeps one state for all its query heads.
    The paper's layer has keys of half the width and values of the whole; here both have the
    head's size.

    Args:
      rank: r, of the gate's projection.
      normaliser: of the log-gate.
      output_gate: whether the normalised output is gated by the input.
      chunk: tokens of a chunk, a power of two; None: the kernel's own choice.

    >>> GLA().init(jax.random.key(0), Sizes(heads=4, kv_heads=2, dim=8, width=32), jnp.float32)[
    ...     "gate_up"].shape
    (16, 16)
    """

    masks: ClassVar = (Causal,)
    takes: ClassVar = ("segment_ids", "valid", "scale")
    needs: ClassVar = ("x", "q", "k")

    rank: int = 16
    normaliser: float = 16.0
    output_gate: bool = True
    eps: float = 1e-5
    chunk: int | None = None

    def __post_init__(self):
        if self.rank < 1 or self.normaliser <= 0:
            raise ConfigError(f"GLA: rank {self.rank} and normaliser {self.normaliser} must be > 0")

    def init(self, key, sizes, dtype):
        keys, values = sizes.kv_heads * sizes.dim, sizes.heads * sizes.dim
        down, up, gate = jax.random.split(key, 3)
        draw = lambda key, rows, columns: jax.random.normal(key, (rows, columns), dtype) * (
            rows**-0.5
        )
        params = {
            "gate_down": draw(down, sizes.width, self.rank),
            "gate_up": draw(up, self.rank, keys),
            "gate_bias": jnp.zeros((keys,), dtype),
            "norm": jnp.ones((sizes.dim,), dtype),
        }
        if self.output_gate:
            params["out_gate"] = draw(gate, sizes.width, values)
        return params

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> State:
        return init_matrix(sizes, batch)

    def whole(self, params, q, k, v, call):
        return self._mix(params, v, None, call)[0].astype(q.dtype)

    def extend(self, params, q, k, v, state, call):
        out, state = self._mix(params, v, state, call)
        return out.astype(q.dtype), state

    def log_decay(self, params: Any, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """``logsigmoid(x W_1 W_2 + b) / normaliser``, ``[B, T, K, H]`` in float32."""
        gate = ops.dot(ops.dot(x, params["gate_down"]), params["gate_up"]).astype(jnp.float32)
        gate = gate + ops.value(params["gate_bias"], jnp.float32)
        return jax.nn.log_sigmoid(gate).reshape(shape) / self.normaliser

    def _mix(self, params, v, state, call):
        x, q, k = call.inputs.x, call.inputs.q, call.inputs.k
        decay = self.log_decay(params, x, k.shape)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        out, state = recur(q, k, v, decay, state, call, scale=scale, chunk=self.chunk)
        size = jax.lax.rsqrt(jnp.mean(out**2, axis=-1, keepdims=True) + self.eps)
        out = out * size * ops.value(params["norm"], jnp.float32)
        if self.output_gate:
            gate = ops.dot(x, params["out_gate"]).reshape(out.shape)
            out = out * jax.nn.silu(gate.astype(jnp.float32))
        return out, state
