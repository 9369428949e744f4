"""Linear attention: sums over keys in a state of fixed size, never a T x T matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.feature_maps import PLAIN
from flora_jax.attention.masks import CAUSAL, Mask
from flora_jax.attention.types import Call, Sizes, Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.registry import register

State = dict[str, jax.Array]


def init_sums(batch: int, heads: int, features: int, dim: int) -> State:
    """``S [B, K, F, D]`` and ``z [B, K, F]`` of no keys."""
    shape = (batch, heads, features)
    return {"S": jnp.zeros((*shape, dim), jnp.float32), "z": jnp.zeros(shape, jnp.float32)}


def sums(fk: jax.Array, v: jax.Array) -> State:
    """``S = sum_j phi(k_j)^T v_j`` and ``z = sum_j phi(k_j)`` over all keys."""
    s = jnp.einsum("bskf,bskd->bkfd", fk, v, preferred_element_type=jnp.float32)
    return {"S": s, "z": fk.sum(axis=1, dtype=jnp.float32)}


def read(fq: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
    """``phi(q) S [B, T, N, D]`` and ``phi(q) . z [B, T, N]``."""
    heads = state["z"].shape[1]
    grouped = fq.reshape(*fq.shape[:2], heads, fq.shape[2] // heads, fq.shape[3])
    out = jnp.einsum("btkgf,bkfd->btkgd", grouped, state["S"], preferred_element_type=jnp.float32)
    norm = jnp.einsum("btkgf,bkf->btkg", grouped, state["z"], preferred_element_type=jnp.float32)
    return out.reshape(*fq.shape[:3], -1), norm.reshape(fq.shape[:3])


def causal_sums(
    fq: jax.Array,
    fk: jax.Array,
    v: jax.Array,
    state: State,
    *,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    chunk: int = 64,
    own: bool = True,
) -> tuple[jax.Array, jax.Array, State]:
    """``sum_{j <= i} phi(q_i) . phi(k_j) v_j`` and the same without v, a chunk at a time.

    Inside a chunk as a masked product, before it by the state; the backward pass recomputes each
    chunk from the state at its start.

    Args:
      fq: ``[B, T, N, F]``.
      fk, v: ``[B, T, K, F]`` and ``[B, T, K, D]``; N a multiple of K.
      state: of the keys before.
      q_segments, k_segments: ``[B, T]``; key segments are contiguous runs, and the state before
        is seen by all.
      own: whether a query sees the key at its own place.

    Returns:
      ``(sums [B, T, N, D], normalisers [B, T, N], state)`` in float32.
    """
    batch, length, heads, features = fq.shape
    kv_heads = v.shape[2]
    size = min(chunk, length)
    count = -(-length // size)

    def cut(x: jax.Array, mode: str = "constant") -> jax.Array:
        pad = [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, mode=mode)
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    grouped = fq.reshape(batch, length, kv_heads, heads // kv_heads, features)
    xs = {"q": cut(grouped), "k": cut(fk), "v": cut(v)}
    carry = dict(state)
    if q_segments is not None:
        xs |= {"qs": cut(q_segments, "edge"), "ks": cut(k_segments, "edge")}
        carry |= {"S0": state["S"], "z0": state["z"], "segment": jnp.full((batch,), -1, jnp.int32)}
    lower = jnp.tri(size, k=0 if own else -1, dtype=bool)

    def step(carry: State, x: State) -> tuple[State, tuple[jax.Array, jax.Array]]:
        weights = jnp.einsum("bikgf,bjkf->bkgij", x["q"], x["k"])
        seen = lower
        if "qs" in x:
            same = (x["qs"][:, :, None] == x["ks"][:, None]) | (x["ks"][:, None] == -1)
            seen = (lower & same)[:, None, None]
        weights = jnp.where(seen, weights, 0)
        out = jnp.einsum("bkgij,bjkd->bikgd", weights, x["v"], preferred_element_type=jnp.float32)
        norm = jnp.moveaxis(weights.sum(axis=-1), 3, 1)
        before = _before(x, carry)
        return _after(x, carry), (out + before[0], norm + before[1])

    if count == 1:
        carry, (out, norm) = step(carry, jax.tree.map(lambda a: a[0], xs))
        out, norm = out[None], norm[None]
    else:
        carry, (out, norm) = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, xs)
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(batch, count * size, heads, *y.shape[5:])
    new = {"S": carry["S"], "z": carry["z"]}
    return join(out)[:, :length], join(norm)[:, :length], new


def _before(x: State, carry: State) -> tuple[jax.Array, jax.Array]:
    """What a chunk's queries read from the keys before the chunk."""

    def product(s: str, z: str) -> tuple[jax.Array, jax.Array]:
        out = jnp.einsum("bikgf,bkfd->bikgd", x["q"], carry[s])
        return out, jnp.einsum("bikgf,bkf->bikg", x["q"], carry[z])

    out, norm = product("S", "z")
    if "qs" not in x:
        return out, norm
    shared_out, shared_norm = product("S0", "z0")
    mine = (x["qs"] == carry["segment"][:, None])[..., None, None]
    return jnp.where(mine[..., None], out, shared_out), jnp.where(mine, norm, shared_norm)


def _after(x: State, carry: State) -> State:
    """The state behind a chunk: of its last segment, and of what every segment sees."""
    if "qs" not in x:
        new = sums(x["k"], x["v"])
        return {name: carry[name] + new[name] for name in new}
    last = x["ks"][:, -1]
    shared = x["ks"] == -1
    kept = (x["ks"] == last[:, None]) | shared
    part = lambda which: sums(x["k"] * which[..., None, None], x["v"])
    stays = last == carry["segment"]
    base = {
        "S": jnp.where(stays[:, None, None, None], carry["S"], carry["S0"]),
        "z": jnp.where(stays[:, None, None], carry["z"], carry["z0"]),
    }
    mine, all_ = part(kept), part(shared)
    return {
        "S": base["S"] + mine["S"],
        "z": base["z"] + mine["z"],
        "S0": carry["S0"] + all_["S"],
        "z0": carry["z0"] + all_["z"],
        "segment": last.astype(jnp.int32),
    }


def all_sums(
    fq: jax.Array, fk: jax.Array, v: jax.Array, segments: jax.Array | None, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The same over all keys, or all of a query's segment: once forwards, once backwards."""
    if segments is None:
        return read(fq, sums(fk, v))
    none = init_sums(fk.shape[0], fk.shape[2], fk.shape[3], v.shape[3])
    back = lambda x: jnp.flip(x, axis=1)
    how = {"q_segments": segments, "k_segments": segments, "chunk": chunk}
    out, norm, _ = causal_sums(fq, fk, v, none, **how)
    how = {"q_segments": back(segments), "k_segments": back(segments), "chunk": chunk}
    late_out, late_norm, _ = causal_sums(back(fq), back(fk), back(v), none, own=False, **how)
    return out + back(late_out), norm + back(late_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureAttention(Variant):
    """Base class: ``o_i = phi(q_i) S / (phi(q_i) . z)``, sums over the keys that i sees.

    Args:
      eps: added to the normaliser.
      chunk: tokens of a chunk in the causal form.
    """

    takes: ClassVar = ("segment_ids", "valid", "prefix")

    eps: float = 1e-6
    chunk: int = 64

    def features(self, sizes: Sizes) -> int:
        """F."""
        raise NotImplementedError

    def state_heads(self, sizes: Sizes) -> int:
        """Heads of the state: K, or N where every query head maps the keys on its own."""
        return sizes.kv_heads

    def q_features(self, params: Any, q: jax.Array) -> jax.Array:
        """``[B, T, N, H] -> [B, T, N, F]`` in float32."""
        raise NotImplementedError

    def k_features(self, params: Any, k: jax.Array) -> jax.Array:
        """``[B, S, K, H] -> [B, S, K, F]``, or N heads of N repeated ones, in float32."""
        raise NotImplementedError

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> State:
        return init_sums(batch, self.state_heads(sizes), self.features(sizes), sizes.dim)

    def whole(self, params, q, k, v, call):
        fq, (fk, v) = self.q_features(params, q), self._keys(params, k, v, call.valid)
        segments = call.segment_ids
        if not call.mask.causal:
            out, norm = all_sums(fq, fk, v, segments, self.chunk)
        else:
            none = init_sums(fk.shape[0], fk.shape[2], fk.shape[3], v.shape[3])
            how = {"q_segments": segments, "k_segments": segments, "chunk": self.chunk}
            out, norm, _ = causal_sums(fq, fk, v, none, **how)
        return self._finish(params, fq, out, norm, call).astype(q.dtype)

    def extend(self, params, q, k, v, state, call):
        fq, (fk, v) = self.q_features(params, q), self._keys(params, k, v, call.valid)
        out, norm, state = causal_sums(fq, fk, v, state, chunk=self.chunk)
        return self._finish(params, fq, out, norm, call).astype(q.dtype), state

    def _keys(self, params, k, v, valid):
        fk = self.k_features(params, k)
        if valid is not None:
            fk = jnp.where(valid.astype(bool)[..., None, None], fk, 0)
        return fk, repeat_heads(v, fk.shape[2])

    def _finish(self, params, fq, out, norm, call: Call):
        if call.prefix is not None:
            fk, v = self._keys(params, call.prefix.k, call.prefix.v, call.prefix.on)
            every = lambda a: jnp.broadcast_to(a, (fq.shape[0], *a.shape[1:]))
            more, more_norm = read(fq, sums(every(fk), every(v)))
            out, norm = out + more, norm + more_norm
        return out / (norm + self.eps)[..., None]


def repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[B, S, K, H]`` with every head ``heads // K`` times."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def head_map(params: Any, name: str, x: jax.Array) -> jax.Array:
    """``x_n W_n (+ b_n)`` of every head with ``W [N, D, F]``, in float32; K heads are repeated."""
    w = ops.value(params[f"{name}_map"], jnp.float32)
    x = repeat_heads(x, w.shape[0]).astype(jnp.float32)
    y = jnp.einsum("btnd,ndf->btnf", x, w)
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + ops.value(bias, jnp.float32)


MAPS = (*PLAIN, "t2r")


@register(
    "LinearAttention",
    family="attention",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    parameters="0 (t2r: 2 N (D + 1) F)",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttention(FeatureAttention):
    """Linear attention with a fixed feature map, or T2R's learnt one (arXiv 2103.13076).

    ``o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j) + eps)``, over ``j <= i`` or
    all j; no ``1 / sqrt(D)`` but inside ``taylor2``. The state is ``S [B, K, F, D], z [B, K, F]``.

    Args:
      feature_map: ``elu1, relu, softmax, exp, taylor2, taylor2_unscaled, dpfp1, dpfp2, dpfp3`` or
        ``t2r``: ``relu(x W + b)`` with a W for each query head, for queries and for keys.
      feature_dim: F of ``t2r``; 0 for the head's own size.

    >>> sizes = Sizes(heads=4, kv_heads=2, dim=16, width=64)
    >>> LinearAttention(feature_map="taylor2").features(sizes)
    153
    """

    feature_map: str = "elu1"
    feature_dim: int = 0

    def __post_init__(self):
        if self.feature_map not in MAPS:
            raise ConfigError(unknown("feature_map", self.feature_map, MAPS))

    def features(self, sizes):
        if self.feature_map == "t2r":
            return self.feature_dim or sizes.dim
        return PLAIN[self.feature_map].size(sizes.dim)

    def state_heads(self, sizes):
        return sizes.heads if self.feature_map == "t2r" else sizes.kv_heads

    def init(self, key, sizes, dtype):
        if self.feature_map != "t2r":
            return {}
        shape = (sizes.heads, sizes.dim, self.features(sizes))
        draw = lambda key: jax.random.normal(key, shape, dtype) * sizes.dim**-0.5
        first, second = jax.random.split(key)
        bias = jnp.zeros((shape[0], shape[2]), dtype)
        return {"q_map": draw(first), "k_map": draw(second), "q_bias": bias, "k_bias": bias}

    def q_features(self, params, q):
        return self._map(params, q, "q")

    def k_features(self, params, k):
        return self._map(params, k, "k")

    def _map(self, params, x, role):
        if self.feature_map == "t2r":
            return jnp.maximum(head_map(params, role, x), 0)
        return PLAIN[self.feature_map].of(x.astype(jnp.float32), role)
