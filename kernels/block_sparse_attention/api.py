"""The op: one differentiable function over all its implementations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flora_jax.kernels import dispatch
from flora_jax.kernels.block_sparse_attention import mosaic_gpu, pallas_tpu, reference, xla
from flora_jax.kernels.block_sparse_attention.layout import Shape, Steps, shape_of
from flora_jax.kernels.manual_axes import together

FORWARD = {
    "mosaic_gpu": mosaic_gpu.forward,
    "pallas_tpu": pallas_tpu.forward,
    "xla": xla.forward,
    "reference": reference.forward,
}
BACKWARD = {
    "mosaic_gpu": mosaic_gpu.backward,
    "pallas_tpu": pallas_tpu.backward,
    "xla": xla.backward,
    "reference": reference.backward,
}


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    table: Array,
    *,
    block_q: int = 128,
    block_k: int = 128,
    scale: float | None = None,
    steps: Steps | None = None,
    implementation: dispatch.Choice = None,
) -> tuple[Array, Array]:
    """Softmax attention of each block of queries over the key blocks that a table lists.

    ``o_i = sum_j softmax_j(scale q_i k_j) v_j`` over the keys ``j`` of the listed blocks only,
    whatever their order; a block listed twice counts twice. Not causal. Last blocks may be short.
    Differentiable in q, k and v (both results have cotangents); the table is data.

    Args:
      q: ``[B, T, N, H]``, float32 or bfloat16.
      k: ``[B, S, K, H]``; query head ``n`` reads key head ``n // (N // K)``.
      v: ``[B, S, K, H]``.
      table: int32 ``[B, N, ceil(T / block_q), entries]``, values in ``[0, ceil(S / block_k))``.
      block_q: queries per block.
      block_k: keys per block.
      scale: default ``H ** -0.5``.
      steps: blocks that a step of a kernel takes; default by its cost model.
      implementation: see ``kernels.dispatch``.

    Returns:
      ``o`` as ``q``, and the natural log of the softmax's sum, ``[B, T, N]`` float32.

    Raises:
      ConfigError: shapes or dtypes do not fit.
      NotImplementedError: the implementation asked for cannot run here; says why.
    """
    shape = shape_of(q, k, v, table, block_q, block_k, scale, steps)
    return _attend(shape, dispatch.chosen(implementation), *together(q, k, v, table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    shape: Shape, choice: dispatch.Choice, q: Array, k: Array, v: Array, table: Array
) -> tuple[Array, Array]:
    name = "block_sparse_attention"
    return dispatch.run(name, FORWARD, shape, q, k, v, table, implementation=choice)


def _forward(shape: Shape, choice: dispatch.Choice, *arrays: Array) -> tuple[Any, Any]:
    o, lse = _attend(shape, choice, *arrays)
    return (o, lse), (*arrays, o, lse)


def _backward(
    shape: Shape, choice: dispatch.Choice, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    do, dlse = cotangents
    name, table = "block_sparse_attention (backward)", saved[3]
    arrays = (*saved, do, dlse.astype(jnp.float32))
    dq, dk, dv = dispatch.run(name, BACKWARD, shape, *arrays, implementation=choice)
    return dq, dk, dv, np.zeros(table.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)
