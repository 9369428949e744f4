"""The public function: one TPU kernel each way, elsewhere the two ops and their sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch
from flora_jax.kernels.gated_linear_attention import Features, gated_linear_attention
from flora_jax.kernels.gated_linear_attention import api as recurrence
from flora_jax.kernels.manual_axes import together
from flora_jax.kernels.window_attention import api as window_op
from flora_jax.kernels.window_attention import window_attention


def hybrid_attention(
    q: Array,
    k: Array,
    v: Array,
    q_plain: Array,
    k_plain: Array,
    *,
    features: Features,
    window: int,
    weights: tuple[float, float] = (0.5, 0.5),
    scale: float | None = None,
    chunk: int | None = None,
    implementation: dispatch.Choice = None,
) -> Array:
    """``w_0 window_attention(q, k, v) + w_1 gated_linear_attention(q', k', v, l)`` with
    ``q', k', l = features(q_plain, k_plain)``: Liger's attention (arXiv 2503.01496).

    Args:
      q, k: rotated, ``[B, T, N, D]`` and ``[B, T, K, D]``, N a multiple of K.
      v: ``[B, T, K, V]``.
      q_plain, k_plain: before the rotation, shaped as q and k.
      features: as of :func:`gated_linear_attention`, whose scale is 1 here.
      window: of :func:`window_attention`.
      weights: of the window and of the recurrence.
      scale: of the window's scores, ``D ** -0.5`` by default.
      chunk: tokens of a chunk of the recurrence; by default the implementation's own choice.
      implementation: see :mod:`flora_jax.kernels.dispatch`; where there is no kernel for both, it
        holds for each of the two ops.

    Returns:
      ``[B, T, N, V]`` in q's dtype, differentiable by all arrays.

    Raises:
      ConfigError: shapes that do not fit, or a chunk that is no power of two.
      NotImplementedError: the implementation asked for cannot run this.
    """
    for name, x, like in (("q_plain", q_plain, q), ("k_plain", k_plain, k)):
        if x.shape != like.shape:
            raise ConfigError(f"{name} must be {like.shape}, not {x.shape}")
    window_op.check(q, k, v, window)
    recurrence.check(q_plain, k_plain, v, chunk=chunk)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    how = {"features": features, "weights": tuple(weights), "scale": scale, "chunk": chunk}
    how["window"] = min(window, k.shape[1])
    two = partial(apart, choice=implementation)
    table = dict.fromkeys(("mosaic_gpu", "xla", "reference"), two) | {"pallas_tpu": _pallas_tpu}
    arrays = together(q, k, v, q_plain, k_plain)
    return dispatch.run("hybrid_attention", table, *arrays, **how, implementation=implementation)


def apart(
    q: Array,
    k: Array,
    v: Array,
    q_plain: Array,
    k_plain: Array,
    *,
    features: Features,
    window: int,
    weights: tuple[float, float],
    scale: float,
    chunk: int | None = None,
    choice: dispatch.Choice = None,
) -> Array:
    """The two ops, each by its own implementation, and their sum."""
    how = {"implementation": choice}
    near, _, _ = window_attention(q, k, v, window=window, scale=scale, **how)
    how |= {"features": features, "scale": 1.0, "chunk": chunk}
    far, _ = gated_linear_attention(q_plain, k_plain, v, **how)
    near, far = (w * x.astype(jnp.float32) for w, x in zip(weights, (near, far)))
    return (near + far).astype(q.dtype)


def _pallas_tpu(*args: Any, **kwargs: Any) -> Array:
    # Pallas is slow to import and most processes never need it.
    from flora_jax.kernels.hybrid_attention.pallas_tpu import pallas_tpu

    return pallas_tpu(*args, **kwargs)
