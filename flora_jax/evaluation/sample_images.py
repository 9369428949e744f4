"""Images from a trained noise process: ancestral DDPM, DDIM, Euler's steps along a flow."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.models.diffusion import DDPM, FlowMatching, Process

SAMPLERS = {DDPM: ("ancestral", "ddim"), FlowMatching: ("euler",)}


def sample_images(
    model: Any,
    params: Any,
    process: Process,
    key: jax.Array,
    labels: jax.Array,
    *,
    size: tuple[int, int],
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
) -> jax.Array:
    """Draws an image ``[B, H, W, C]`` for each label ``[B]``; ``num_classes`` means no class.

    ``ancestral``: ``x_{t-1} ~ N(mean(x_t, x0^), Sigma)`` with the learned variance if there is one.
    ``ddim`` (arXiv 2010.02502): ``x_s = sqrt(a_s) x0^ + sqrt(1 - a_s - s^2) eps^ + s z`` with
    ``s^2 = eta^2 beta~``. ``euler``: ``x -= v / steps`` from t = 1 to 0.
    With ``guidance`` g other than 1 the prediction is ``p(none) + g (p(label) - p(none))``; a
    learned variance stays that of the label. One compiled scan over the steps.

    Args:
      model, params: a DiT and its (bound) parameters.
      size: H and W.
      steps: network calls; by default all of a DDPM's, 50 of a flow.
      sampler: the first that the process has by default.
      eta: of ``ddim``: 0 adds no noise.

    Raises:
      ConfigError: a sampler that the process does not have, more steps than noise levels.
    """
    choices = SAMPLERS[type(process)]
    sampler = sampler or choices[0]
    if sampler not in choices:
        raise ConfigError(unknown(f"sampler of {type(process).__name__}", sampler, choices))
    count = steps or (process.steps if isinstance(process, DDPM) else 50)
    options = (model, process, tuple(size), count, sampler, float(guidance), float(eta))
    return _sample(options, params, key, labels)


@functools.partial(jax.jit, static_argnums=0)
def _sample(options, params, key, labels):
    model, process, size, count, sampler, guidance, eta = options
    channels = model.config.num_channels
    first, key = jax.random.split(key)
    x = jax.random.normal(first, (len(labels), *size, channels))

    def predict(x, time):
        return _guided(model, params, x, jnp.full(labels.shape, time), labels, guidance, channels)

    if isinstance(process, FlowMatching):

        def euler(x, i):
            return x - predict(x, 1 - i / count) / count, None

        return jax.lax.scan(euler, x, jnp.arange(count))[0]

    at = process.respaced(count)
    move = _ancestral if sampler == "ancestral" else functools.partial(_ddim, eta=eta)

    def back(x, step):
        out = predict(x, jnp.asarray(at.time)[step])
        eps, raw = process.split(out, channels)
        steps = jnp.full(labels.shape, step)
        noise = jax.random.normal(jax.random.fold_in(key, step), x.shape)
        return move(process, at, steps, x, eps, raw, jnp.where(step == 0, 0.0, noise)), None

    return jax.lax.scan(back, x, jnp.arange(count)[::-1])[0]


def _guided(model, params, x, time, labels, guidance, channels):
    apply = lambda *args: model.apply({"params": params}, *args)
    if guidance == 1.0:
        return apply(x, time, labels)
    none = jnp.full(labels.shape, model.config.num_classes)
    twice = lambda a: jnp.concatenate([a, a])
    both = apply(twice(x), twice(time), jnp.concatenate([labels, none]))
    given, free = jnp.split(both, 2)
    mean = free + guidance * (given - free)
    return jnp.concatenate([mean[..., :channels], given[..., channels:]], axis=-1)


def _ancestral(process, at, step, x, eps, raw, noise):
    mean = process.posterior(process.image(eps, x, at, step), x, at, step)
    return mean + jnp.exp(0.5 * process.log_variance(raw, at, step)) * noise


def _ddim(process, at, step, x, eps, raw, noise, *, eta):
    signal, before = (jnp.asarray(a)[step].reshape(-1, 1, 1, 1) for a in (at.signal, at.before))
    x0 = process.image(eps, x, at, step)
    # The noise that leads from a clipped image to x.
    eps = (x - jnp.sqrt(signal) * x0) / jnp.sqrt(1 - signal)
    spread = eta * jnp.sqrt((1 - before) / (1 - signal) * (1 - signal / before))
    rest = jnp.sqrt(jnp.maximum(1 - before - jnp.square(spread), 0.0))
    return jnp.sqrt(before) * x0 + rest * eps + spread * noise
