"""Sparse-linear attention as a function of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array

from flora_jax.kernels import dispatch
from flora_jax.kernels.block_sparse_attention import Steps
from flora_jax.kernels.manual_axes import together
from flora_jax.kernels.sla import linear
from flora_jax.kernels.sla.blocks import classify
from flora_jax.kernels.sla.config import SLAConfig


def _main_tpu(*args: Any) -> Array:
    # Pallas is slow to import and most processes never need it.
    from flora_jax.kernels.sla.pallas_tpu import main

    return main(*args)


def _marginal_tpu(*args: Any) -> Array:
    from flora_jax.kernels.sla.marginal_tpu import main

    return main(*args)


# Whatever the softmax branch runs as: only a TPU has kernels for the linear branch.
MAIN = dict.fromkeys(dispatch.IMPLEMENTATIONS, linear.main) | {"pallas_tpu": _main_tpu}
MARGINAL = dict.fromkeys(dispatch.IMPLEMENTATIONS, linear.marginal) | {"pallas_tpu": _marginal_tpu}


def _both(call: linear.Call, *arrays: Any, marginal: Array | None) -> Array:
    """``linear.main``, or of a map ``linear.marginal``, as the platform has it."""
    table, last = (MAIN, ()) if marginal is None else (MARGINAL, (marginal,))
    arrays = together(*arrays, *last)
    return dispatch.run("sla", table, call, *arrays, implementation=call.implementation)


def branches(
    q: Array,
    k: Array,
    v: Array,
    cfg: SLAConfig,
    *,
    scale: float | None = None,
    steps: Steps | None = None,
    tokens: int | None = None,
    implementation: dispatch.Choice = None,
) -> tuple[Array, Array]:
    """The two branches before the projection: ``(o_s as q, o_l float32)``, both ``[B, T, N, H]``.

    See ``sla``.
    """
    call = linear.Call(
        cfg=cfg, scale=scale, steps=steps, tokens=tokens,
        implementation=dispatch.chosen(implementation),
    )  # fmt: skip
    table, marginal = classify(q, k, cfg)
    sparse = linear.sparse_branch(call, q, k, v, table)
    return sparse, _both(call, q, k, v, None, None, marginal=marginal)


def sla(
    q: Array,
    k: Array,
    v: Array,
    params: Mapping[str, Array],
    cfg: SLAConfig,
    *,
    scale: float | None = None,
    steps: Steps | None = None,
    tokens: int | None = None,
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
      steps: blocks in a step of the softmax branch's kernels; default by their cost model.
      tokens: in a step of the TPU kernels of ``main``'s linear branch; default likewise.
      implementation: of both branches, see ``kernels.dispatch``; only ``pallas_tpu`` has kernels
        for the linear one, which runs as XLA's code with the others.

    Source: SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention
    (2509.24006). Where paper and code differ, ``cfg.variant`` says which is followed.
    """
    call = linear.Call(
        cfg=cfg, scale=scale, steps=steps, tokens=tokens,
        implementation=dispatch.chosen(implementation),
    )  # fmt: skip
    table, marginal = classify(q, k, cfg)
    params = {name: params[name] for name in ("kernel", "bias")}
    return _both(call, q, k, v, table, params, marginal=marginal)
