"""Sparse-linear attention as a function of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.kernels import dispatch
from flora_jax.kernels.manual_axes import together
from flora_jax.kernels.sla import linear
from flora_jax.kernels.sla.blocks import classify
from flora_jax.kernels.sla.config import SLAConfig


def _pallas_tpu(*args: Any) -> Array:
    # Pallas is slow to import and most processes never need it.
    from flora_jax.kernels.sla.pallas_tpu import main

    return main(*args)


MAIN = dict.fromkeys(dispatch.IMPLEMENTATIONS, linear.main) | {"pallas_tpu": _pallas_tpu}
"""Of the variant ``main``, whatever the softmax branch in it runs as: only a TPU has a kernel."""


def _main(call: linear.Call, q: Array, k: Array, v: Array, table: Any, params: Any) -> Array:
    arrays = together(q, k, v, table, params)
    return dispatch.run("sla", MAIN, call, *arrays, implementation=call.implementation)


def branches(
    q: Array,
    k: Array,
    v: Array,
    cfg: SLAConfig,
    *,
    scale: float | None = None,
    implementation: dispatch.Choice = None,
) -> tuple[Array, Array]:
    """The two branches before the projection: ``(o_s as q, o_l float32)``, both ``[B, T, N, H]``.

    See ``sla``.
    """
    call = linear.Call(cfg=cfg, scale=scale, implementation=dispatch.chosen(implementation))
    table, marginal = classify(q, k, cfg)
    sparse = linear.sparse_branch(call, q, k, v, table)
    if marginal is None:
        return sparse, _main(call, q, k, v, None, None)
    return sparse, linear.over_marginal(q, k, v, marginal, cfg)


def sla(
    q: Array,
    k: Array,
    v: Array,
    params: Mapping[str, Array],
    cfg: SLAConfig,
    *,
    scale: float | None = None,
    implementation: dispatch.Choice = None,
) -> Array:
    """Sparse-linear attention: ``o = o_s + o_l kernel + bias``. Not causal.

    Blocks of ``block_q`` queries and ``block_k`` keys are compared by the product of their means.
    ``o_s`` is softmax over each row's best blocks only, not rescaled for what is missing; ``o_l``
    is linear attention over the others (see ``SLAConfig``), which the projection fits to ``o_s``.
    With kernel and bias 0, where training starts, the output is ``o_s``. No gradient passes through
    the choice of blocks.

    Args:
      q: ``[B, T, N, H]``, float32 or bfloat16.
      k: ``[B, S, K, H]``; query head ``n`` reads key head ``n // (N // K)``.
      v: ``[B, S, K, H]``.
      params: ``kernel [H, H]`` and ``bias [H]``, shared by all heads; applied in float32.
      cfg: the variant and its sizes.
      scale: of the softmax's scores; default ``H ** -0.5``.
      implementation: of the softmax branch, see ``kernels.dispatch``.

    Source: SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention
    (2509.24006). Where paper and code differ, ``cfg.variant`` says which is followed.
    """
    if cfg.variant == "main":
        call = linear.Call(cfg=cfg, scale=scale, implementation=dispatch.chosen(implementation))
        table, _ = classify(q, k, cfg)
        return _main(call, q, k, v, table, {name: params[name] for name in ("kernel", "bias")})
    sparse, low = branches(q, k, v, cfg, scale=scale, implementation=implementation)
    kernel, bias = (params[name].astype(jnp.float32) for name in ("kernel", "bias"))
    low = jnp.matmul(low, kernel, precision=jax.lax.Precision.HIGHEST) + bias
    return (sparse.astype(jnp.float32) + low).astype(q.dtype)
