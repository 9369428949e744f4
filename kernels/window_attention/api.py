"""The public function, its checks and the table of implementations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch
from flora_jax.kernels.manual_axes import together
from flora_jax.kernels.window_attention.reference import NOBODY, Marks, reference
from flora_jax.kernels.window_attention.xla import xla


def _pallas_tpu(*args: Any, **kwargs: Any) -> tuple[Array, Array, Array]:
    # Pallas is slow to import and most processes never need it.
    from flora_jax.kernels.window_attention.pallas_tpu import pallas_tpu

    return pallas_tpu(*args, **kwargs)


TABLE = {"pallas_tpu": _pallas_tpu, "xla": xla, "reference": reference}


def window_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int,
    scale: float | None = None,
    valid: Array | None = None,
    segment_ids: Array | None = None,
    block: int | None = None,
    implementation: dispatch.Choice = None,
) -> tuple[Array, Array, Array]:
    """Softmax attention of each query over the last ``window`` keys, its own included.

    ``o_i = sum_j softmax_j(scale q_i k_j) v_j`` over ``0 <= i - j < window``. With ``lse`` and
    ``top`` the window's part can share a normaliser with another (LoLCATs): the sum of
    ``e^(s_ij - top_i)`` is ``e^(lse_i - top_i)``.

    Args:
      q: ``[B, T, N, D]``.
      k: ``[B, S, K, D]``, N a multiple of K: query head n reads key head ``n // (N / K)``. Query i
        stands at key ``S - T + i``: the first ``S - T`` keys lie before all queries.
      v: ``[B, S, K, V]``.
      window: at least 1.
      scale: ``D ** -0.5`` by default.
      valid: ``[B, S]``, false where there is no key.
      segment_ids: ``[B, S]``; a query sees keys of its own segment and of segment -1.
      block: queries of a step of the TPU kernels; default by their cost model.
      implementation: see :mod:`flora_jax.kernels.dispatch`.

    Returns:
      ``o [B, T, N, V]`` in q's dtype; ``lse``, the log of the softmax's sum, and ``top``, the
      largest score, ``[B, T, N]`` in float32. A query without keys has o = 0, lse = -inf and a
      finite top. o and lse can be differentiated by q, k and v; top counts as a constant.

    Raises:
      ConfigError: shapes that do not fit.
      NotImplementedError: the implementation asked for cannot run this.

    >>> x = jnp.ones((1, 5, 4, 8))
    >>> o, lse, top = window_attention(x, x[:, :, :2], x[:, :, :2], window=3)
    >>> o.shape, lse.shape
    ((1, 5, 4, 8), (1, 5, 4))
    """
    check(q, k, v, window, valid, segment_ids)
    if block is not None and block < 1:
        raise ConfigError(f"window_attention: a block of {block} queries")
    return dispatch.run(
        "window_attention",
        TABLE,
        *together(q, k, v, _marks(q.shape[1], valid, segment_ids)),
        window=min(window, k.shape[1]),
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        block=block,
        implementation=implementation,
    )


def _marks(length: int, valid: Array | None, segment_ids: Array | None) -> Marks:
    if valid is None and segment_ids is None:
        return None
    marks = jnp.zeros(valid.shape, jnp.int32) if segment_ids is None else segment_ids
    marks = marks.astype(jnp.int32)
    theirs = marks if valid is None else jnp.where(valid.astype(bool), marks, NOBODY)
    return marks[:, marks.shape[1] - length :], theirs


def check(
    q: Array,
    k: Array,
    v: Array,
    window: int,
    valid: Array | None = None,
    segment_ids: Array | None = None,
) -> None:
    """Raises ConfigError for shapes that do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ConfigError(f"{name} must be [B, T, heads, channels], not {x.shape}")
    batch, length, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    if window < 1 or length < 1:
        raise ConfigError(f"window_attention needs a window and a token: {window}, {length}")
    if heads % key_heads:
        raise ConfigError(f"{heads} query heads are no multiple of {key_heads} key heads")
    if keys < length:
        raise ConfigError(f"{length} queries, the last at the last of {keys} keys")
    wanted = {
        "k": (k, (batch, keys, key_heads, dim)),
        "v": (v, (batch, keys, key_heads, v.shape[3])),
        "valid": (valid, (batch, keys)),
        "segment_ids": (segment_ids, (batch, keys)),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ConfigError(f"{name} must be {shape}, not {x.shape}")
