"""Any adapter that is one weight for all inputs, as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_jax.core.plan import Plan
from flora_jax.engine.build import Builder, Converted
from flora_jax.engine.changes import changes
from flora_jax.engine.compress import Target, compress


def to_lora(
    params: Any,
    adapters: Any,
    plan: Plan | Mapping[str, Plan],
    *,
    weights: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    randomized: bool | None = None,
    example: Any = None,
) -> Converted:
    """The LoRA that adapters amount to on this base: ``a b = sum_i weight_i (W_i - W0)``.

    Exact where the methods' maps have low-rank factors (LoRA and its relatives, Hydra, VeRA, NOLA,
    FLoRA, ...): the factors are put side by side and, where a limit is given, cut by QR and a small
    SVD, dW unformed. Else the dense change of one weight at a time is decomposed. Changes of a
    layer's bias go into the LoRA's bias, exactly; replaced vectors (norms, biases) stay replaced.
    A scanned stack gets one rank, that of the layer that needs most.

    Args:
      params, adapters, plan, weights: as for :func:`flora_jax.bind`; one adapter or named ones.
      rank: at most so many components; without any limit only exact factors are taken.
      energy: as few components as keep this share of ``|dW|^2``.
      error: as few as leave this relative Frobenius error.
      randomized: decompose dense changes by a random sketch (fixed key); None: where it pays.
      example: features of one row, for methods that generate weights from them: its LoRA.

    Returns:
      ``(plan, adapters, report)``: LoRA of scale 1, rank and relative error of each weight.

    Raises:
      PlanError: a method that does not merge; a change that is not low-rank, without any limit;
        a changed bias beside an embedding.

    >>> import jax, jax.numpy as jnp, flora_jax as flora
    >>> params = {"up": {"kernel": jnp.ones((6, 4))}}
    >>> plan = flora.plan(params, {".*/kernel": flora.VeRA(rank=2)})
    >>> adapters = flora.init(plan, jax.random.key(0), params)
    >>> plan, adapters, report = to_lora(params, adapters, plan)
    >>> report["up/kernel"].rank, report["up/kernel"].exact
    (2, True)
    """
    target = Target(rank=rank, energy=energy, error=error, randomized=randomized)
    built = Builder()
    for change in changes(params, adapters, plan, weights, example):
        if change.is_kernel:
            built.lora(change, compress(change, target), change.bias)
        else:
            built.replace(change, change.after)
    return built.done()
