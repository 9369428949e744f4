"""Learning-rate schedules: frozen dataclasses called with the step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from flora_jax.core.errors import ConfigError


class Schedule:
    """``schedule(step) -> learning rate``; a frozen dataclass."""

    def __call__(self, step: jax.Array | int) -> jax.Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """``lr(t) = value``."""

    value: float

    def __call__(self, step):
        return jnp.asarray(self.value, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """``lr(t) = start + (end - start) min(t / steps, 1)``.

    >>> float(Linear(start=1.0, end=0.0, steps=4)(1))
    0.75
    """

    start: float
    end: float = 0.0
    steps: int

    def __post_init__(self):
        _positive(self, "steps")

    def __call__(self, step):
        return jnp.asarray(
            optax.linear_schedule(self.start, self.end, self.steps)(step), jnp.float32
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """``lr(t) = floor + (peak - floor) (1 + cos(pi min(t / steps, 1))) / 2`` (arXiv 1608.03983).

    >>> [round(float(Cosine(peak=1.0, steps=4)(t)), 3) for t in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """

    peak: float
    steps: int
    floor: float = 0.0

    def __post_init__(self):
        _positive(self, "steps")

    def __call__(self, step):
        part = jnp.minimum(jnp.asarray(step, jnp.float32) / self.steps, 1.0)
        return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * part))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warmup(Schedule):
    """Rises linearly to ``then(0)`` over ``steps`` steps, then follows ``then(t - steps)``.

    The first step already moves: ``lr(0) = then(0) / steps``.

    >>> schedule = Warmup(steps=2, then=Constant(value=1.0))
    >>> [float(schedule(t)) for t in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """

    steps: int
    then: Schedule

    def __post_init__(self):
        _positive(self, "steps")

    def __call__(self, step):
        step = jnp.asarray(step)
        rising = self.then(0) * (step + 1) / self.steps
        return jnp.where(step < self.steps, rising, self.then(jnp.maximum(step - self.steps, 0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Schedule):
    """``lr(t) = factor * of(t)``."""

    factor: float
    of: Schedule

    def __call__(self, step):
        return self.factor * self.of(step)


def as_schedule(value: float | Schedule) -> Schedule:
    """A schedule; a number is a constant one.

    Raises:
      ConfigError: neither a number nor a schedule.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Constant(value=float(value))
    raise ConfigError(f"learning rate {value!r} is neither a number nor a Schedule")


def _positive(schedule: Schedule, field: str) -> None:
    if getattr(schedule, field) < 1:
        raise ConfigError(
            f"{type(schedule).__name__}.{field}={getattr(schedule, field)} must be >= 1"
        )
