"""Several trainings in one program: one base, one plan, n members stacked on a leading axis.

A *member* is a run of its own: its seed, its learning rate, its own non-finite stop. The step is
``vmap`` of the ordinary one over the members' states with the base unbatched, so a layer's product
with the base is one larger product, and nothing of the base is copied. Where that would not pay
(large steps on a CPU) a scan takes a few members at a time, in the same program.
"""

from __future__ import annotations

import collections
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
from flora_jax.training.step import (
    Step,
    mean_over,
    objective_function,
    split_batch,
    step_function,
    sums_function,
)

BATCHES = ("shared", "own")
# Temporaries of more than 32 MiB come fresh from the kernel at every step (the largest threshold
# of glibc's malloc), page by page; XLA's are up to 1.4 times what the backward pass keeps.
CPU_KEPT = 24 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """What the members of one program differ in.

    Args:
      seeds: one a member: of its initial adapters and its dropout, as ``fit(seed=)``.
      rates: a factor on each member's learning rate; empty for ones. Exact where an update is
        proportional to the learning rate (AdamW, SGD, Lion, LIFT, Adafactor without decay).
      batches: ``shared``: all members see the same batch; ``own``: a batch's arrays have a leading
        axis of members (:class:`StackedBatches`).
      chunk: how many members are batched together; the chunks run one after another within the
        step, with the same results to rounding. 0: all members, but on a CPU without a mesh only as
        many as keep at most 24 MiB for the backward pass.

    >>> len(Members(seeds=(0, 1, 2), rates=(0.5, 1.0, 2.0)))
    3
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    batches: str = "shared"
    chunk: int = 0

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
        if not 0 <= self.chunk <= len(self.seeds):
            raise ConfigError(f"Members.chunk={self.chunk} is outside 0..{len(self.seeds)}")

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
        """What a checkpoint's members are known by: all that changes a result."""
        fields = dataclasses.asdict(self)
        del fields["chunk"]
        return json.dumps(fields)


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
    own, count = members.batches == "own", len(members)

    def step(states: TrainState, base: Any, batch: Mapping[str, Any]):
        batch = dict(batch)
        # who has fallen behind has met a bad gradient before
        alive = states.step == jnp.max(states.step)
        chunk = members.chunk or count
        if not members.chunk and shardings is None and jax.default_backend() == "cpu":
            first = jax.tree.map(lambda x: x[0], (states, batch if own else {}))
            kept = kept_bytes(loss, plan, first[0], base, first[1] or batch, accumulate)
            chunk = min(max(CPU_KEPT // max(kept, 1), 1), count)

        def run(x):
            state, rate, going, mine = x
            return one(state, base, mine if own else batch, rate, going)

        each = (states, rates, alive, batch if own else None)
        if chunk >= count:
            return jax.vmap(run)(each)
        return jax.lax.map(run, each, batch_size=None if chunk == 1 else chunk)

    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)


def kept_bytes(
    loss: Loss, plan: Plan, state: TrainState, base: Any, batch: Any, accumulate: int = 1
) -> int:
    """Bytes of what the backward pass of one (micro-)batch keeps, the base's own arrays apart."""
    objective = objective_function(loss, plan)

    def backward(state: TrainState, base: Any, batch: Any):
        micro = jax.tree.map(lambda x: x[0], split_batch(batch, accumulate))
        forward = lambda train: objective(train, state.frozen, base, micro, state.rng)
        return jax.vjp(forward, state.train, has_aux=True)[1]

    known = lambda x: (x.shape, x.dtype)
    shared = collections.Counter(known(x) for x in jax.tree.leaves(base))
    total = 0
    for x in jax.tree.leaves(jax.eval_shape(backward, state, base, batch)):
        if shared[known(x)] > 0:
            shared[known(x)] -= 1
        elif not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            total += math.prod(x.shape) * x.dtype.itemsize
    return total


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
