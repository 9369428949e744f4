"""The optimizer step: pure, jitted once, the base an argument that is never differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax.core import paths
from flora_jax.core.bind import bind
from flora_jax.core.errors import ConfigError
from flora_jax.core.initialize import combine
from flora_jax.core.plan import Plan
from flora_jax.training import optim
from flora_jax.training.losses import Loss
from flora_jax.training.state import TrainState

Metrics = dict[str, Any]
Step = Callable[[TrainState, Any, Mapping[str, Any]], tuple[TrainState, Metrics]]


def split_batch(batch: Mapping[str, Any], parts: int) -> Any:
    """``[B, ...] -> [parts, B / parts, ...]``; part j takes rows ``j, j + parts, ...``.

    Strided, not blocked: with B sharded over devices every part keeps a share on each device.

    Raises:
      ConfigError: ``parts`` does not divide the batch.
    """

    def one(path: str, x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ConfigError(f"accumulate={parts} does not divide {path!r} of {x.shape[0]} rows")
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return paths.map_with_path(one, dict(batch))


def _sum_gradients(grad: Callable, batch: Any, rng: jax.Array, parts: int) -> Any:
    """``grad(batch, key)`` summed over micro-batches in a scan."""
    if parts == 1:
        return grad(batch, jax.random.fold_in(rng, 0))
    micro = split_batch(batch, parts)
    keys = jax.vmap(lambda j: jax.random.fold_in(rng, j))(jnp.arange(parts))
    first = jax.tree.map(lambda x: x[0], (micro, keys))
    shapes = jax.eval_shape(grad, *first)
    # bfloat16 adapters still add up in float32
    wide = lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32))  # noqa: E731
    add = lambda total, new: jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new)  # noqa: E731
    total, _ = jax.lax.scan(
        lambda carry, x: (add(carry, grad(*x)), None), jax.tree.map(wide, shapes), (micro, keys)
    )
    return total


def objective_function(loss: Loss, plan: Plan) -> Callable[..., tuple[jax.Array, Any]]:
    """``objective(train, frozen, base, micro, key) -> (sum, (weight, aux))``, to differentiate."""

    def objective(train: Any, frozen: Any, base: Any, micro: Mapping[str, Any], key: Any):
        adapters = combine(train, frozen)
        bound = bind(base, adapters, plan, example=micro.get("example"), rng=key, train=True)
        total, weight, aux = loss(bound, micro, key, True)
        return total, (weight, aux)

    return objective


def step_function(
    loss: Loss, plan: Plan, optimizer: Any, *, accumulate: int = 1, clip: float | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as a pure function, not yet jitted; arguments as in :func:`make_step`.

    Returns:
      ``step(state, base, batch, rate=None, alive=None)``. ``rate`` multiplies the optimizer's
      update; where ``alive`` is False the state comes back unchanged, as after a bad gradient.

    Raises:
      ConfigError: ``accumulate`` or ``clip`` is not positive.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate={accumulate} must be at least 1")
    if clip is not None and clip <= 0:
        raise ConfigError(f"clip={clip} must be positive, or None")

    objective = objective_function(loss, plan)

    def step(state: TrainState, base: Any, batch: Mapping[str, Any], rate=None, alive=None):
        grad = jax.value_and_grad(
            lambda train, micro, key: objective(train, state.frozen, base, micro, key), has_aux=True
        )
        rng = jax.random.fold_in(state.rng, state.step)
        (total, (weight, aux)), grads = _sum_gradients(
            lambda micro, key: grad(state.train, micro, key), batch, rng, accumulate
        )
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
        metrics = {"loss": total * scale, "weight": weight}
        metrics |= {name: value * scale for name, value in aux.items()}
        return _update(state, grads, metrics, optimizer, clip, rate, alive)

    return step


def make_step(
    loss: Loss,
    plan: Plan,
    optimizer: Any,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    donate: bool = True,
    shardings: Any = None,
) -> Step:
    """The jitted ``step(state, base, batch) -> (state, metrics)``.

    ``g = sum_j grad(sum_j) / sum_j weight_j`` over the micro-batches, clipped to a global norm.
    When the loss or any gradient is not finite the state comes back unchanged, ``metrics["ok"]`` is
    False and ``metrics["bad"]`` says which arrays: see :func:`bad_paths`.

    Args:
      loss: ``loss(bound, batch, rng, train) -> (sum, weight, aux)``.
      plan: what :func:`flora_jax.bind` needs; static.
      optimizer: an optimizer dataclass, :class:`Groups` or an optax transform.
      accumulate: micro-batches per step; must divide the batch.
      clip: largest global gradient norm, or None.
      donate: reuse the state's buffers. The base is never donated.
      shardings: shardings of the returned state (``state_shardings``), or None.

    Raises:
      ConfigError: ``accumulate`` or ``clip`` is not positive.
    """
    step = step_function(loss, plan, optimizer, accumulate=accumulate, clip=clip)
    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)


def _update(
    state: TrainState,
    grads: Any,
    metrics: Metrics,
    optimizer: Any,
    clip: float | None,
    rate: Any,
    alive: Any,
) -> tuple[TrainState, Metrics]:
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
    norm = jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros(())))
    bad = {path: ~jnp.isfinite(s) for path, s in paths.flatten(squares).items()}
    ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    ok = ok if alive is None else ok & alive
    if clip is not None:
        shrink = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-16))
        grads = jax.tree.map(lambda g: g * shrink, grads)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.train)
    tx = optax.with_extra_args_support(optim.build(optimizer, state.train))
    updates, opt_state = tx.update(grads, state.opt_state, state.train, value=metrics["loss"])
    if rate is not None:
        updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
    new = (state.step + 1, optax.apply_updates(state.train, updates), opt_state)
    old = (state.step, state.train, state.opt_state)
    count, train, opt_state = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    rates = optim.learning_rates(opt_state)
    rates = rates if rate is None else {name: rate * value for name, value in rates.items()}
    metrics |= {"grad_norm": norm, "ok": ok, "bad": bad, **rates}
    return dataclasses.replace(state, step=count, train=train, opt_state=opt_state), metrics


def bad_paths(metrics: Metrics) -> list[str]:
    """Adapter arrays whose gradient was not finite, sorted; read only when ``ok`` is False."""
    return sorted(path for path, flag in jax.device_get(metrics["bad"]).items() if flag)


def sums_function(loss: Loss, plan: Plan) -> Callable[..., tuple[jax.Array, Metrics]]:
    """``sums(train, frozen, base, batch) -> (weight, {"loss": sum, <aux>: sum})``, not jitted."""

    def sums(train: Any, frozen: Any, base: Any, batch: Mapping[str, Any]):
        bound = bind(base, combine(train, frozen), plan, example=batch.get("example"))
        total, weight, aux = loss(bound, batch, None, False)
        return weight, {"loss": total, **aux}

    return sums


def trouble(metrics: Any) -> str:
    """What was not finite in a step."""
    bad = bad_paths(metrics)
    where = f"gradients not finite in {', '.join(bad[:5])}" if bad else "finite gradients"
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"loss {float(metrics['loss'])}, {where}{more}"


def make_evaluator(loss: Loss, plan: Plan) -> Callable[..., dict[str, float]]:
    """``evaluate(state, base, batches) -> {"loss": ..., <aux>: ...}``, means over all batches."""
    sums = jax.jit(sums_function(loss, plan))

    def evaluate(state: TrainState, base: Any, batches: Iterable[Any]) -> dict[str, float]:
        means = mean_over(lambda batch: sums(state.train, state.frozen, base, batch), batches)
        return {name: float(value) for name, value in means.items()}

    return evaluate


def mean_over(sums: Callable[[Any], Any], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """Sums over batches divided by the weights' sum, in float64 on the host.

    Raises:
      ConfigError: there are no batches, or their weights are zero.
    """
    weight, totals = np.zeros(()), {}
    for batch in batches:
        part, values = jax.device_get(sums(batch))
        weight = weight + np.asarray(part, np.float64)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    if not weight.all():
        raise ConfigError("evaluation saw no examples: the data set is empty or fully masked")
    return {name: value / weight for name, value in totals.items()}
