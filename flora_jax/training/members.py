"""Several trainings in one program: one base, one plan, n members stacked on a leading axis.

A *member* is a run of its own: its seed, its learning rate, its own non-finite stop. The step is
``vmap`` of the ordinary one over the members' states with the base unbatched, so a layer's product
with the base is one larger product, and nothing of the base is copied.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError
from flora_jax.core.plan import Plan
from flora_jax.training.losses import Loss
from flora_jax.training.state import TrainState, fresh_state
from flora_jax.training.step import Step, mean_over, step_function, sums_function

BATCHES = ("shared", "own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """What the members of one program differ in.

    Args:
      seeds: one a member: of its initial adapters and its dropout, as ``fit(seed=)``.
      rates: a factor on each member's learning rate; empty for ones. Exact where an update is
        proportional to the learning rate (AdamW, SGD, Lion, LIFT, Adafactor without decay).
      batches: ``shared``: all members see the same batch; ``own``: a batch's arrays have a leading
        axis of members (:class:`StackedBatches`).

    >>> len(Members(seeds=(0, 1, 2), rates=(0.5, 1.0, 2.0)))
    3
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    batches: str = "shared"

    def __post_init__(self):
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "rates", tuple(self.rates))
        if not self.seeds:
            raise ConfigError("Members.seeds is empty: one seed a member")
        if self.rates and len(self.rates) != len(self.seeds):
            raise ConfigError(f"Members: {len(self.rates)} rates for {len(self.seeds)} seeds")
        if not all(math.isfinite(rate) and rate > 0 for rate in self.rates):
            raise ConfigError(f"Members.rates={self.rates} must be positive factors")
        if self.batches not in BATCHES:
            raise ConfigError(f"Members.batches={self.batches!r} is not one of shared, own")

    def __len__(self) -> int:
        return len(self.seeds)

    def check(self, optimizer: Any) -> None:
        """Raise ConfigError where a factor on the updates is not one on the learning rate."""
        if set(self.rates) - {1.0} and not getattr(optimizer, "proportional", False):
            raise ConfigError(
                f"Members.rates={self.rates}: the updates of {optimizer!r} are not known to be "
                "proportional to its learning rate; train these members one by one"
            )

    def states(self, plan: Plan, base: Any, optimizer: Any, adapters: Any = None) -> TrainState:
        """Step 0 of every member, stacked; each is what :func:`fit` with its seed starts from.

        Args:
          adapters: where all members start, instead of fresh ones from their seeds.
        """
        states = [fresh_state(plan, base, optimizer, seed, adapters) for seed in self.seeds]
        return jax.tree.map(lambda *x: jnp.stack(x), *states)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def member(states: Any, index: int) -> Any:
    """One member of a stacked state (or of any stacked tree): an ordinary one.

    ``member(states, 3).adapters`` is an adapter tree like any other.
    """
    count = len(jax.tree.leaves(states)[0])
    if not 0 <= index < count:
        raise ConfigError(f"member {index} of {count}: they are numbered 0 to {count - 1}")
    return jax.tree.map(lambda x: x[index], states)


def make_members_step(
    loss: Loss,
    plan: Plan,
    optimizer: Any,
    members: Members,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    donate: bool = True,
    shardings: Any = None,
) -> Step:
    """The jitted ``step(states, base, batch) -> (states, metrics)`` of all members at once.

    Metrics are arrays ``[n]``. A member whose loss or gradient is not finite (``ok`` False) stops:
    its state stays as it was from then on, the others go on. Arguments as in :func:`make_step`.

    Raises:
      ConfigError: rates with an optimizer whose updates are not proportional to its own.
    """
    members.check(optimizer)
    one = step_function(loss, plan, optimizer, accumulate=accumulate, clip=clip)
    # without rates the program is exactly that of the ordinary step, batched
    rates = jnp.asarray(members.rates, jnp.float32) if members.rates else None
    batch_axis = 0 if members.batches == "own" else None
    axes = (0, None, batch_axis, None if rates is None else 0, 0)

    def step(states: TrainState, base: Any, batch: Mapping[str, Any]):
        # who has fallen behind has met a bad gradient before
        alive = states.step == jnp.max(states.step)
        return jax.vmap(one, in_axes=axes)(states, base, dict(batch), rates, alive)

    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)


def make_members_evaluator(loss: Loss, plan: Plan) -> Callable[..., dict[str, np.ndarray]]:
    """``evaluate(states, base, batches) -> {metric: [n]}``: each member's means over all batches.

    Every member judges the same batches.
    """
    sums = jax.jit(jax.vmap(sums_function(loss, plan), in_axes=(0, 0, None, None)))

    def evaluate(states: TrainState, base: Any, batches: Iterable[Any]) -> dict[str, np.ndarray]:
        return mean_over(lambda b: sums(states.train, states.frozen, base, dict(b)), batches)

    return evaluate


def alive(states: TrainState) -> np.ndarray:
    """``[n]`` bool: the members that no bad gradient has stopped."""
    steps = np.asarray(jax.device_get(states.step))
    return steps == steps.max()


def spread(values: Mapping[str, Any], good: np.ndarray) -> dict[str, float]:
    """Figures ``[n]`` as numbers: ``name`` the mean of the good members, ``name/i`` of member i."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        value = np.asarray(value, np.float64)
        if value.ndim == 0:
            flat[name] = float(value)
            continue
        flat[name] = float(np.mean(value[good])) if good.any() else math.nan
        flat |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
    return flat


class StackedBatches:
    """Each member's own stream of batches as one stream of stacked ones; it can be resumed.

    Args:
      streams: one a member, with batches of equal shapes.
    """

    def __init__(self, streams: Sequence[Iterable[Mapping[str, Any]]]):
        self.streams: list[Iterator[Mapping[str, Any]]] = [iter(stream) for stream in streams]
        if all(hasattr(stream, "set_state") for stream in self.streams):
            self.get_state = lambda: {"streams": [_state(stream) for stream in self.streams]}
            self.set_state = self._set_state

    def _set_state(self, state: Mapping[str, Any]) -> None:
        for stream, one in zip(self.streams, state["streams"], strict=True):
            stream.set_state(one["bytes"].encode() if set(one) == {"bytes"} else one)

    def __iter__(self) -> StackedBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [dict(next(stream)) for stream in self.streams]
        return jax.tree.map(lambda *x: np.stack(x), *batches)


def _state(stream: Any) -> Mapping[str, Any]:
    """A stream's position as JSON: grain's iterators may give bytes."""
    state = stream.get_state()
    return {"bytes": state.decode()} if isinstance(state, bytes) else state
