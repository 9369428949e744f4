"""The first task of a small model: how its base is made and kept, and what of it is retained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import flora_jax as flora
from flora_jax.adapters import Replace
from flora_jax.core.adapter import Adapter
from flora_jax.core.paths import flatten, unflatten
from flora_jax.io import safetensors
from flora_jax.training import create_state, make_step
from flora_jax.training.losses import Loss
from flora_jax.training.optim import AdamW, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a base is made.

    Args:
      data: the first task.
      steps, batch_size, optimizer: of its training.
    """

    data: Any
    steps: int = 300
    batch_size: int = 64
    optimizer: Optimizer = AdamW(learning_rate=2e-3)


def trained(
    loss: Loss,
    params: Any,
    how: Pretraining,
    seed: int,
    tokenizer: Any = None,
    rules: Mapping[str, Adapter | None] | None = None,
) -> dict[str, Any]:
    """``params`` after the first task, all of them trained unless there are rules."""
    plan = flora.plan(params, rules or {".*": Replace()})
    adapters = flora.init(plan, jax.random.key(0), params)
    state = create_state(plan, adapters, how.optimizer, seed)
    step = make_step(loss, plan, how.optimizer)
    batches: Iterator[Mapping[str, Any]] = iter(
        how.data.train(tokenizer, how.batch_size, seed=seed)
    )
    for _ in range(how.steps):
        state, _ = step(state, params, next(batches))
    return jax.block_until_ready(flora.materialize(flora.bind(params, state.adapters, plan)))


def kept(folder: Path | None, make: Callable[[], Any]) -> Any:
    """The base of a run folder (``base.safetensors``), or a new one that is then kept there."""
    path = None if folder is None else folder / "base.safetensors"
    if path is not None and path.exists():
        tensors = safetensors.TensorFiles(path)
        return unflatten({name: jnp.asarray(array) for name, array in tensors.items()})
    base = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_one(path, jax.device_get(flatten(base)))
    return base


@dataclasses.dataclass(frozen=True)
class Retention:
    """What adapted parameters still know of the first task.

    Args:
      loss: of the first task's model.
      heads: its own head, laid over the adapted body.
      data: the first task's data.
      tokenizer: for texts.
    """

    loss: Loss
    heads: Mapping[str, Any]
    data: Any
    tokenizer: Any = None

    def __call__(self, bound: Any) -> dict[str, float]:
        """``retention``, accuracy in per cent, and ``retention_nll`` on held-out data."""
        sums = jax.jit(lambda params, batch: self.loss(params, batch, None, False)[1:])
        total, seen = {"accuracy": 0.0, "nll": 0.0}, 0.0
        for batch in self.data.evaluation(self.tokenizer, 256):
            weight, aux = jax.device_get(sums({**bound, **self.heads}, batch))
            seen += float(weight)
            total = {name: value + float(aux[name]) for name, value in total.items()}
        return {
            "retention": 100 * total["accuracy"] / seen,
            "retention_nll": total["nll"] / seen,
        }
