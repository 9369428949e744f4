"""The perceptual weights generator of VLoRA: a small decoder from visual tokens to factors.

Pure functions of ``{name: array}``. Names of a generator begin with its weight type; the arrays of
its N decoder layers are stacked ``[N, ...]`` and scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]
STD = 0.02
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that all generators of a model share.

    Args:
      tokens, features: P and d_v of the visual tokens ``[P, d_v]``.
      width: d, of the generator.
      depth: N decoder layers.
      heads: of both attentions.
      ratio: hidden width of the FFN over d.
    """

    tokens: int
    features: int
    width: int
    depth: int
    heads: int
    ratio: int


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    # Released: truncated at +-2, a hundred standard deviations out.
    return STD * jax.random.normal(key, shape)


def init_visual(key: jax.Array, s: Sizes) -> Params:
    """``z = v W_v + b_v + pos``: ``d_v d + d + P d`` numbers."""
    kw, kp = jax.random.split(key)
    return {
        "visual.kernel": _normal(kw, s.features, s.width),
        "visual.bias": jnp.zeros(s.width),
        "visual.position": jax.random.normal(kp, (s.tokens, s.width)),
    }


def init_generator(key: jax.Array, s: Sizes, queries: int, n_in: int, rank: int) -> Params:
    """Queries ``[n, d]``, N decoder layers, the last norm and the head ``[d, in r]``."""
    d, n, h = s.width, s.depth, s.width * s.ratio
    k = iter(jax.random.split(key, 12))
    out = {"queries": jax.random.normal(next(k), (queries, d))}
    for attention in ("self", "cross"):
        for name in ("query", "key", "value", "out"):
            out[f"{attention}.{name}.kernel"] = _normal(next(k), n, d, d)
            out[f"{attention}.{name}.bias"] = jnp.zeros((n, d))
    out["up.kernel"], out["up.bias"] = _normal(next(k), n, d, h), jnp.zeros((n, h))
    out["down.kernel"], out["down.bias"] = _normal(next(k), n, h, d), jnp.zeros((n, d))
    for name in ("norm1", "norm2", "norm3"):
        out[f"{name}.scale"], out[f"{name}.bias"] = jnp.ones((n, d)), jnp.zeros((n, d))
    out["norm.scale"], out["norm.bias"] = jnp.ones(d), jnp.zeros(d)
    out["head.kernel"], out["head.bias"] = _normal(next(k), d, n_in * rank), jnp.zeros(n_in * rank)
    return out


def _linear(p: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}.kernel"].astype(x.dtype) + p[f"{name}.bias"].astype(x.dtype)


def _norm(p: Params, name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    wide = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPSILON)
    return (wide * p[f"{name}.scale"] + p[f"{name}.bias"]).astype(x.dtype)


def _attention(p: Params, name: str, x: jax.Array, z: jax.Array, heads: int) -> jax.Array:
    """Full attention of ``x [B, n, d]`` to ``z [B, P, d]``."""
    split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
    project: Callable[[str, jax.Array], jax.Array] = lambda part, y: split(
        _linear(p, f"{name}.{part}", y)
    )
    y = jax.nn.dot_product_attention(project("query", x), project("key", z), project("value", z))
    return _linear(p, f"{name}.out", y.reshape(x.shape))


def _layer(heads: int, z: jax.Array, x: jax.Array, p: Params) -> tuple[jax.Array, None]:
    """One pre-norm decoder layer; only the queries are normed."""
    y = _norm(p, "norm1", x)
    x = x + _attention(p, "self", y, y, heads)
    x = x + _attention(p, "cross", _norm(p, "norm2", x), z, heads)
    hidden = jax.nn.gelu(_linear(p, "up", _norm(p, "norm3", x)), approximate=False)
    return x + _linear(p, "down", hidden), None


def visual_tokens(p: Params, v: jax.Array) -> jax.Array:
    """``v [B, P, d_v] -> z [B, P, d]``."""
    return _linear(p, "visual", v) + p["visual.position"].astype(v.dtype)


def generate_factors(p: Params, z: jax.Array, heads: int, rank: int) -> jax.Array:
    """``z [B, P, d] -> A [B, n, in, r]``: a query for each layer, one head for all of them."""
    whole = ("queries", "norm.scale", "norm.bias", "head.kernel", "head.bias")
    layers = {name: a for name, a in p.items() if name not in whole}
    x = jnp.broadcast_to(p["queries"].astype(z.dtype), (z.shape[0], *p["queries"].shape))
    x, _ = jax.lax.scan(partial(_layer, heads, z), x, layers)
    a = _linear(p, "head", _norm(p, "norm", x))
    return a.reshape(*a.shape[:-1], -1, rank)
