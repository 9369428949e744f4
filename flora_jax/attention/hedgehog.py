"""Hedgehog: feature maps trained so that linear attention weighs keys as softmax does; and LoLCATs,
the same beside an exact window."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention import cache
from flora_jax.attention.feature_maps import HEDGEHOG
from flora_jax.attention.linear import (
    FeatureAttention,
    causal_sums,
    head_map,
    init_sums,
    repeat_heads,
)
from flora_jax.attention.masks import CAUSAL, Causal, Mask
from flora_jax.attention.types import NO_SEGMENT, Sizes
from flora_jax.attention.window import MASKED, in_order
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.registry import register
from flora_jax.kernels.window_attention import window_attention

STARTS = ("identity", "zero", "normal", "kaiming")


@register(
    "Hedgehog",
    family="attention",
    paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    arxiv="2402.04347",
    parameters="2 N D F' (+ 2 N F' with bias)",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hedgehog(FeatureAttention):
    """Linear attention with a learnt map for each query head, for queries and for keys.

    ``phi(x) = f(x W + b) [F = 2 F']`` with f one of :data:`feature_maps.HEDGEHOG`, each with its
    mirror image ``f(-y)``; ``a_ij = phi_q(q_i) . phi_k(k_j) / sum_m phi_q(q_i) . phi_k(k_m)``,
    without ``1 / sqrt(D)``. Keys and values are repeated to N heads. The state is
    ``S [B, N, F, D], z [B, N, F]``.

    The paper's form is ``feature_map="exp", bias=True`` from the identity; the default is its
    stable form without bias.

    Args:
      feature_map: ``exp, softmax, exp_shifted, joint``.
      feature_dim: F'; 0 for the head's own size.
      bias: b, a number for each feature.
      skip: ``f(x + x W)``; needs F' = D.
      start: of W: ``identity``, ``zero`` (with skip), ``normal``, or ``kaiming``: uniform within
        ``sqrt(6 / (D F'))``, what the official code of LoLCATs draws.

    >>> Hedgehog(feature_dim=8).features(Sizes(heads=4, kv_heads=2, dim=16, width=64))
    16
    """

    feature_map: str = "softmax"
    feature_dim: int = 0
    bias: bool = False
    skip: bool = False
    start: str = "identity"
    eps: float = 1e-12

    def __post_init__(self):
        if self.feature_map not in HEDGEHOG:
            raise ConfigError(unknown("feature_map", self.feature_map, HEDGEHOG))
        if self.start not in STARTS:
            raise ConfigError(unknown("start", self.start, STARTS))
        if self.start == "zero" and not self.skip:
            raise ConfigError("start='zero' maps everything to the same features; add skip=True")

    def check(self, sizes: Sizes) -> None:
        if self.skip and self._half(sizes) != sizes.dim:
            raise ConfigError(f"skip=True needs feature_dim={sizes.dim}, got {self.feature_dim}")

    def _half(self, sizes: Sizes) -> int:
        return self.feature_dim or sizes.dim

    def features(self, sizes):
        return 2 * self._half(sizes)

    def state_heads(self, sizes):
        return sizes.heads

    def init(self, key, sizes, dtype):
        shape = (sizes.heads, sizes.dim, self._half(sizes))

        def draw(key: jax.Array) -> jax.Array:
            if self.start == "identity":
                return jnp.broadcast_to(jnp.eye(*shape[1:], dtype=dtype), shape)
            if self.start == "zero":
                return jnp.zeros(shape, dtype)
            if self.start == "normal":
                return jax.random.normal(key, shape, dtype)
            bound = math.sqrt(6 / (shape[1] * shape[2]))
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        first, second = jax.random.split(key)
        params = {"q_map": draw(first), "k_map": draw(second)}
        if self.bias:
            params |= {f"{n}_bias": jnp.zeros((shape[0], shape[2]), dtype) for n in "qk"}
        return params

    def q_features(self, params, q):
        return self._map(params, q, "q")

    def k_features(self, params, k):
        return self._map(params, k, "k")

    def _map(self, params, x, name):
        y = head_map(params, name, x)
        if self.skip:
            y = y + repeat_heads(x, y.shape[2]).astype(y.dtype)
        return HEDGEHOG[self.feature_map](y)

    def similarity(
        self, params: Any, fq: jax.Array, fk: jax.Array, scores: jax.Array, gap: jax.Array
    ) -> jax.Array:
        """The weights before their normalisation, of some rows: for the distillation.

        Args:
          fq: ``[B, R, N, F]``.
          fk: ``[B, S, N, F]``.
          scores: ``[B, N, R, S]`` of the softmax, MASKED where a key is not seen.
          gap: ``i - j [R, S]``.
        """
        return jnp.einsum("brnf,bsnf->bnrs", fq, fk)


@register(
    "LoLCATs",
    family="attention",
    paper="LoLCATs: On Low-Rank Linearizing of Large Language Models",
    arxiv="2410.10254",
    parameters="2 N D F' + N",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoLCATs(Hedgehog):
    """Exact softmax over the last keys, Hedgehog's maps for the older ones, one normaliser.

    ``o_i = (g sum_win e^(s_ij - m_i) v_j + l sum_old phi_q phi_k v_j) / (g sum_win e^(s_ij - m_i) +
    l sum_old phi_q phi_k)``, ``0 <= i - j < window`` and ``i - j >= window``, ``m_i`` the largest
    score in the window, ``g = sigmoid(w)`` for each head, ``l = 1``. The state is a ring of
    ``window`` keys and values beside the sums over older ones. Causal only.

    Args:
      window: w exact keys, the query's own included.
      gate_start: of w; -2.1972 makes g = 0.1.
      affine: ``l = 1 - g``.
      keep_scale: weigh the window by ``e^s`` itself. The official code takes ``e^(s - m)``, so that
        how much the older keys count depends on the largest score in the window.
    """

    masks: ClassVar = (Causal,)
    takes: ClassVar = ("segment_ids", "valid", "scale")

    window: int = 64
    gate_start: float = -2.1972
    affine: bool = False
    keep_scale: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(f"window={self.window} must be at least 1")

    def init(self, key, sizes, dtype):
        gate = jnp.full((sizes.heads,), self.gate_start, dtype)
        return super().init(key, sizes, dtype) | {"gate": gate}

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> dict[str, jax.Array]:
        ring = cache.init_cache(sizes, batch, self.window, dtype)
        return ring | init_sums(batch, sizes.heads, self.features(sizes), sizes.dim)

    def whole(self, params, q, k, v, call):
        batch, length = q.shape[:2]
        size = min(self.window, length)
        near = window_attention(
            q,
            k,
            v,
            window=self.window,
            scale=call.scale,
            valid=call.valid,
            segment_ids=call.segment_ids,
        )
        # A key joins the sums when the token that is ``window`` places later comes.
        late = lambda x, value: jnp.pad(
            x[:, : length - size],
            [(0, 0), (size, 0), *[(0, 0)] * (x.ndim - 2)],
            constant_values=value,
        )
        there = jnp.ones((batch, length), bool) if call.valid is None else call.valid.astype(bool)
        segments = call.segment_ids
        return self._hybrid(
            params,
            q,
            near,
            late(k, 0),
            late(v, 0),
            late(there, False),
            init_sums(batch, q.shape[2], self._features(params), v.shape[3]),
            None if segments is None else (segments, late(segments, NO_SEGMENT)),
        )[0]

    def extend(self, params, q, k, v, state, call):
        length = q.shape[1]
        ring = {name: state[name] for name in ("k", "v")}
        old_k, old_v, there = in_order(ring, call.positions[:, :1])
        new = jnp.ones(q.shape[:2], bool) if call.valid is None else call.valid.astype(bool)
        join = lambda old, x: jnp.concatenate([old.astype(x.dtype), x], axis=1)
        all_k, all_v, there = join(old_k, k), join(old_v, v), join(there, new)
        out, older = self._hybrid(
            params,
            q,
            window_attention(
                q, all_k, all_v, window=self.window, scale=call.scale, valid=there
            ),
            all_k[:, :length],
            all_v[:, :length],
            there[:, :length] & new,
            {name: state[name] for name in ("S", "z")},
        )
        return out, cache.write_ring(ring, k, v, call.positions, call.valid) | older

    def _features(self, params: Any) -> int:
        return 2 * params["q_map"].shape[-1]

    def _hybrid(self, params, q, near, k, v, there, state, segments=None):
        """``near`` of the window; ``k, v, there`` of the keys that join the sums at each token."""
        mine, theirs = (None, None) if segments is None else segments
        fk = jnp.where(there[..., None, None], self.k_features(params, k), 0)
        far, far_norm, state = causal_sums(
            self.q_features(params, q),
            fk,
            repeat_heads(v, fk.shape[2]),
            state,
            q_segments=mine,
            k_segments=theirs,
            chunk=self.chunk,
        )
        out, lse, top = near
        on_near, on_far = self._factors(params, top)
        on_near = on_near * jnp.exp(lse - top)
        norm = on_near + on_far * far_norm
        out = on_near[..., None] * out.astype(jnp.float32) + on_far[..., None] * far
        return (out / (norm + self.eps)[..., None]).astype(q.dtype), state

    def _factors(self, params: Any, top: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the window and the sums are multiplied by, ``[B, T, N]`` each; top is the same."""
        gate = jax.nn.sigmoid(ops.value(params["gate"], jnp.float32))
        near, far = jnp.broadcast_to(gate, top.shape), 1 - gate if self.affine else 1.0
        far = jnp.broadcast_to(far, top.shape)
        if not self.keep_scale:
            return near, far
        # Both by e^(top): the larger of the two stays 1.
        return near * jnp.exp(jnp.minimum(top, 0)), far * jnp.exp(-jnp.maximum(top, 0))

    def similarity(self, params, fq, fk, scores, gap):
        near = (gap >= 0) & (gap < self.window)
        window = jnp.where(near, scores, MASKED)
        top = jax.lax.stop_gradient(window.max(axis=-1, keepdims=True))
        on_near, on_far = self._factors(params, jnp.moveaxis(top[..., 0], 1, 2))
        of = lambda x: jnp.moveaxis(x, 2, 1)[..., None]
        exact = of(on_near) * jnp.exp(window - top)
        return jnp.where(near, exact, of(on_far) * super().similarity(params, fq, fk, scores, gap))
