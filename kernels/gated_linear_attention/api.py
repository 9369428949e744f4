"""The public function, its checks and the table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch
from flora_jax.kernels.gated_linear_attention.reference import reference
from flora_jax.kernels.gated_linear_attention.xla import xla
from flora_jax.kernels.manual_axes import together

Features = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def _pallas_tpu(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    # Pallas is slow to import and most processes never need it.
    from flora_jax.kernels.gated_linear_attention.pallas_tpu import pallas_tpu

    return pallas_tpu(*args, **kwargs)


def _mosaic_gpu(
    q: jax.Array, k: jax.Array, v: jax.Array, g: Any, state: jax.Array, segments: Any, **kwargs: Any
) -> tuple[jax.Array, jax.Array]:
    from flora_jax.kernels.gated_linear_attention.mosaic_gpu import mosaic_gpu, supported

    if kwargs["features"] is not None:
        # A refusal comes before they are computed.
        supported(q, k, v, segments, kwargs["chunk"])
    return _apart(mosaic_gpu, exact=False)(q, k, v, g, state, segments, **kwargs)


def _apart(run: Callable[..., Any], exact: bool) -> Callable[..., Any]:
    """``run`` after the features, which it does not compute itself: in float32, or as q is."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, g: Any, *args: Any, **kwargs: Any) -> Any:
        features = kwargs.pop("features")
        if features is None:
            return run(q, k, v, g, *args, **kwargs)
        *qk, g = features(q.astype(jnp.float32), k.astype(jnp.float32))
        qkv = (x.astype(jnp.float32 if exact else q.dtype) for x in (*qk, v))
        out, last = run(*qkv, g, *args, **kwargs)
        return out.astype(q.dtype), last

    return call


TABLE = {
    "mosaic_gpu": _mosaic_gpu,
    "pallas_tpu": _pallas_tpu,
    "xla": _apart(xla, exact=True),
    "reference": _apart(reference, exact=True),
}


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk: int | None = None,
    features: Features | None = None,
    implementation: dispatch.Choice = None,
) -> tuple[jax.Array, jax.Array]:
    """``S_t = diag(exp(l_t)) S_(t-1) + k_t^T v_t``, ``o_t = scale q_t S_t``: causal attention
    without softmax, normaliser or growing cache (Yang et al. 2023, arXiv 2312.06635).

    A decay per key channel is GLA and HGRN2, one per head RetNet and Mamba-2's form, none plain
    linear attention. The token's own ``k_t^T v_t`` is not decayed.

    Args:
      q: ``[B, T, N, K]``.
      k: ``[B, T, H, K]``, N a multiple of H: query head n reads head ``n // (N / H)``, whose state
        is kept once.
      v: ``[B, T, H, V]``.
      log_decay: l, at most 0; ``[B, T, H, K]`` per channel, ``[B, T, H]`` per head, None for no
        decay. Any float dtype; used in float32.
      initial_state: S_0, ``[B, H, K, V]``; zero by default.
      scale: ``K ** -0.5`` by default.
      segment_ids: ``[B, T]`` of packed sequences: the state starts from zero where the number
        changes. The first segment continues the initial state.
      chunk: tokens a chunk, a power of two; by default the implementation's own choice.
      features: ``q, k -> q', k', l``, computed in float32 and a number of l for each of k, where q
        and k are what a layer has: the TPU kernel makes them where it reads a chunk, and they are
        never written. A pure function of the last axis of arrays of any shape, hashable; instead
        of ``log_decay``.
      implementation: see :mod:`flora_jax.kernels.dispatch`.

    Returns:
      ``o [B, T, N, V]`` in q's dtype and the last state ``[B, H, K, V]`` in float32. Both can be
      differentiated, by all float arguments.

    Raises:
      ConfigError: shapes that do not fit, both features and log_decay, or a chunk that is no power
        of two.
      NotImplementedError: the implementation asked for cannot run this.

    >>> x = jnp.ones((1, 5, 4, 8))
    >>> out, state = gated_linear_attention(x, x[:, :, :2], x[:, :, :2])
    >>> out.shape, state.shape
    ((1, 5, 4, 8), (1, 2, 8, 8))
    """
    batch, _, _, dim = check(q, k, v, log_decay, initial_state, segment_ids, chunk)
    if features is not None and log_decay is not None:
        raise ConfigError("gated_linear_attention: features make the log_decay")
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if initial_state is None:
        initial_state = jnp.zeros((batch, k.shape[2], dim, v.shape[3]), jnp.float32)
    segments = None
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        segments = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0))).astype(jnp.int32)
    arrays = together(q, k, v, log_decay, initial_state.astype(jnp.float32), segments)
    return dispatch.run(
        "gated_linear_attention",
        TABLE,
        *arrays,
        scale=dim**-0.5 if scale is None else float(scale),
        chunk=chunk,
        features=features,
        implementation=implementation,
    )


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[int, ...]:
    """The shape of q; raises ConfigError for shapes that do not fit and a bad chunk."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ConfigError(f"{name} must be [B, T, heads, channels], not {x.shape}")
    batch, length, all_heads, dim = q.shape
    heads = k.shape[2]
    if length == 0:
        raise ConfigError("gated_linear_attention needs at least one token")
    if all_heads % heads:
        raise ConfigError(f"{all_heads} query heads are no multiple of {heads} key heads")
    wanted = {
        "k": (k, [(batch, length, heads, dim)]),
        "v": (v, [(batch, length, heads, v.shape[-1])]),
        "log_decay": (log_decay, [(batch, length, heads, dim), (batch, length, heads)]),
        "initial_state": (initial_state, [(batch, heads, dim, v.shape[-1])]),
        "segment_ids": (segment_ids, [(batch, length)]),
    }
    for name, (x, shapes) in wanted.items():
        if x is not None and x.shape not in shapes:
            fits = " or ".join(map(str, shapes))
            raise ConfigError(f"{name} must be {fits}, not {x.shape}")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ConfigError(f"chunk must be a power of two, not {chunk}")
    return q.shape
