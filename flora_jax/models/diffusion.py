"""Noise processes of image generators: DDPM with a learned variance, and flow matching.

A process says how an image ``x0`` is corrupted at a time, what the network's output stands for and
what it is trained on. The losses of ``flora_jax.training`` and the samplers of
``flora_jax.evaluation`` are written against it; nothing here knows a network.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError, unknown

SCHEDULES = ("linear", "cosine")


class Tables(NamedTuple):
    """What a discrete process needs at each of its n steps, float32 ``[n]``.

    With ``a_t`` the share of signal left, ``x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps`` and
    ``q(x_{t-1} | x_t, x0) = N(mean_x0 x0 + mean_xt x_t, exp(log_variance))``.
    """

    signal: Any
    before: Any
    log_beta: Any
    log_variance: Any
    mean_x0: Any
    mean_xt: Any
    time: Any


def tables(signal: np.ndarray, time: np.ndarray) -> Tables:
    """The tables of a process from ``a_t``, float64 and falling, and the network's time of each."""
    before = np.append(1.0, signal[:-1])
    beta = 1 - signal / before
    variance = beta * (1 - before) / (1 - signal)
    # The first step's posterior is a point; its logarithm is cut at the second's.
    log_variance = np.log(np.append(variance[1:2], variance[1:]) if len(beta) > 1 else beta)
    mean_x0 = beta * np.sqrt(before) / (1 - signal)
    mean_xt = (1 - before) * np.sqrt(1 - beta) / (1 - signal)
    columns = (signal, before, np.log(beta), log_variance, mean_x0, mean_xt, time)
    return Tables(*(np.asarray(c, np.float32) for c in columns))


def _rows(values: Any, step: jax.Array, like: jax.Array) -> jax.Array:
    """``values[step] [B]`` with trailing axes of size one, to multiply ``like [B, ...]``."""
    return jnp.asarray(values)[step].reshape(-1, *(1,) * (like.ndim - 1))


def _mean(x: jax.Array) -> jax.Array:
    """``[B, ...] -> [B]``."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM:
    """Denoising diffusion over ``steps`` noise levels (arXiv 2006.11239), as DiT trains it.

    ``x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps``; the network predicts ``eps`` and, with twice the
    channels, ``v`` in [-1, 1] of a variance ``Sigma = exp(f log beta_t + (1 - f) log beta~_t)``,
    ``f = (v + 1) / 2`` (arXiv 2102.09672). The loss is ``mean (eps - eps^)^2`` and, where the
    variance is learned and ``vlb`` is on, the term of the variational bound in bits a number, which
    moves the variance alone.

    Args:
      steps: noise levels; the network's time is ``step / steps``.
      schedule: ``linear`` (beta from 0.1/steps to 20/steps) or ``cosine``.
      vlb: add the bound to the loss of a network with a learned variance.
      levels: different values of a pixel in [-1, 1], for the bound's last step: 256 of a
        photograph, 17 of scikit-learn's digits.
      clip: keep a sampler's idea of the image in [-clip, clip]; None leaves it alone.

    >>> process = DDPM(steps=100)
    >>> process.tables.signal.shape, bool(process.tables.signal[-1] < 1e-4)
    ((100,), True)
    """

    steps: int = 1000
    schedule: str = "linear"
    vlb: bool = True
    levels: int = 256
    clip: float | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ConfigError(unknown("schedule", self.schedule, SCHEDULES))
        least = 21 if self.schedule == "linear" else 2
        if self.steps < least:
            raise ConfigError(f"steps={self.steps}: a {self.schedule} schedule needs {least}")
        if self.levels < 2:
            raise ConfigError(f"levels={self.levels} must be at least 2")

    @functools.cached_property
    def signal(self) -> np.ndarray:
        """``a_t``, float64 ``[steps]``: the share of the image's variance left at each step."""
        n = self.steps
        if self.schedule == "linear":
            beta = np.linspace(0.1 / n, 20 / n, n)
        else:
            curve = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
        return np.cumprod(1 - beta)

    @functools.cached_property
    def tables(self) -> Tables:
        """The tables of all steps."""
        return self.respaced(self.steps)

    def respaced(self, count: int) -> Tables:
        """The tables of a sampler that takes ``count`` evenly spaced steps, the last one included.

        Raises:
          ConfigError: more steps than there are.
        """
        if not 1 <= count <= self.steps:
            raise ConfigError(f"a sampler of {count} steps for a process of {self.steps}")
        chosen = np.round(np.linspace(0, self.steps - 1, count)).astype(int)
        chosen[-1] = self.steps - 1
        return tables(self.signal[chosen], chosen / self.steps)

    def check(self, learned_variance: bool) -> None:
        """Nothing: a network may learn the variance or not."""

    def corrupt(self, x0: jax.Array, noise: jax.Array, u: jax.Array) -> tuple[Any, Any, Any]:
        """``(x_t, time [B], what terms needs)`` for ``u [B]`` uniform in [0, 1)."""
        step = jnp.minimum((u * self.steps).astype(jnp.int32), self.steps - 1)
        signal = _rows(self.tables.signal, step, x0)
        x_t = jnp.sqrt(signal) * x0 + jnp.sqrt(1 - signal) * noise
        return x_t, step / self.steps, (x0, noise, x_t, step)

    def terms(self, out: jax.Array, state: Any) -> dict[str, jax.Array]:
        """``noise`` and, with a learned variance and ``vlb``, ``vlb``, each ``[B]``."""
        x0, noise, x_t, step = state
        eps, raw = self.split(out, x0.shape[-1])
        found = {"noise": _mean(jnp.square(noise - eps))}
        if raw is not None and self.vlb:
            found["vlb"] = self.bound(jax.lax.stop_gradient(eps), raw, x0, x_t, step)
        return found

    def match(self, out: jax.Array, teacher: jax.Array, state: Any) -> dict[str, jax.Array]:
        """``match_noise`` and, with a learned variance, ``match_variance``, each ``[B]``.

        ``mean (eps_T - eps_S)^2`` and ``mean (Sigma_T - Sigma_S)^2``: the hybrid distillation of
        LiT (arXiv 2501.12976).
        """
        x0, _, _, step = state
        (eps, raw), (eps_t, raw_t) = (self.split(o, x0.shape[-1]) for o in (out, teacher))
        found = {"match_noise": _mean(jnp.square(eps_t - eps))}
        if raw is not None and raw_t is not None:
            sigma = lambda r: jnp.exp(self.log_variance(r, self.tables, step))
            found["match_variance"] = _mean(jnp.square(sigma(raw_t) - sigma(raw)))
        return found

    def split(self, out: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """``eps`` and the raw variance, float32."""
        out = out.astype(jnp.float32)
        return out[..., :channels], (out[..., channels:] if out.shape[-1] > channels else None)

    def log_variance(self, raw: jax.Array | None, at: Tables, step: jax.Array) -> jax.Array:
        """``log Sigma`` of the learned range; of the posterior's variance for a network without."""
        low = jnp.asarray(at.log_variance)[step]
        if raw is None:
            return low.reshape(-1, 1, 1, 1)
        low, high = (_rows(table, step, raw) for table in (at.log_variance, at.log_beta))
        share = (raw + 1) / 2
        return share * high + (1 - share) * low

    def image(self, eps: jax.Array, x_t: jax.Array, at: Tables, step: jax.Array) -> jax.Array:
        """``x0`` if the noise in ``x_t`` is ``eps``."""
        signal = _rows(at.signal, step, x_t)
        x0 = (x_t - jnp.sqrt(1 - signal) * eps) / jnp.sqrt(signal)
        return x0 if self.clip is None else jnp.clip(x0, -self.clip, self.clip)

    def posterior(self, x0: jax.Array, x_t: jax.Array, at: Tables, step: jax.Array) -> jax.Array:
        """The mean of ``q(x_{t-1} | x_t, x0)``."""
        return _rows(at.mean_x0, step, x0) * x0 + _rows(at.mean_xt, step, x_t) * x_t

    def bound(self, eps, raw, x0, x_t, step) -> jax.Array:
        """The step's term of the variational bound, in bits a number, ``[B]``."""
        at, exact = self.tables, dataclasses.replace(self, clip=None)
        true = self.posterior(x0, x_t, at, step)
        mean = self.posterior(exact.image(eps, x_t, at, step), x_t, at, step)
        log_true, log_var = _rows(at.log_variance, step, x0), self.log_variance(raw, at, step)
        kl = -1 + log_var - log_true + jnp.exp(log_true - log_var)
        kl = 0.5 * (kl + jnp.square(true - mean) * jnp.exp(-log_var))
        last = -log_likelihood(x0, mean, 0.5 * log_var, self.levels)
        return jnp.where(step == 0, _mean(last), _mean(kl)) / math.log(2)


def log_likelihood(x: jax.Array, mean: Any, log_std: Any, levels: int) -> jax.Array:
    """``log P(x)`` of a Gaussian rounded to ``levels`` values between -1 and 1, the tails included.

    >>> x = jnp.linspace(-1, 1, 5)
    >>> bool(jnp.allclose(jnp.exp(log_likelihood(x, 0.3, -1.0, 5)).sum(), 1, atol=1e-5))
    True
    """
    half, scale = 1 / (levels - 1), jnp.exp(-log_std)
    low, high = scale * (x - half - mean), scale * (x + half - mean)
    inside = jax.scipy.stats.norm.cdf(high) - jax.scipy.stats.norm.cdf(low)
    inside = jnp.log(jnp.maximum(inside, 1e-12))
    below, above = jax.scipy.stats.norm.logcdf(high), jax.scipy.stats.norm.logcdf(-low)
    return jnp.where(x < -1 + half, below, jnp.where(x > 1 - half, above, inside))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Rectified flow (arXiv 2209.03003, 2210.02747): ``x_t = (1 - t) x0 + t eps``, t in [0, 1].

    The network predicts the velocity ``eps - x0``; the loss is the mean squared error. There is no
    variance.
    """

    def check(self, learned_variance: bool) -> None:
        """Raise ConfigError for a network that learns a variance."""
        if learned_variance:
            raise ConfigError("flow matching has no variance: set learned_variance=False")

    def corrupt(self, x0: jax.Array, noise: jax.Array, u: jax.Array) -> tuple[Any, Any, Any]:
        """``(x_t, time [B], what terms needs)`` for ``u [B]`` uniform in [0, 1)."""
        t = u.reshape(-1, *(1,) * (x0.ndim - 1))
        return (1 - t) * x0 + t * noise, u, noise - x0

    def terms(self, out: jax.Array, state: Any) -> dict[str, jax.Array]:
        """``noise [B]``: the squared error of the velocity."""
        return {"noise": _mean(jnp.square(state - out.astype(jnp.float32)))}

    def match(self, out: jax.Array, teacher: jax.Array, state: Any) -> dict[str, jax.Array]:
        """``match_noise [B]``: the squared difference of the velocities."""
        return {"match_noise": _mean(jnp.square((teacher - out).astype(jnp.float32)))}


Process = DDPM | FlowMatching
