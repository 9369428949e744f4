"""Noise processes against closed forms, and samplers on data whose best predictor is known."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.evaluation import sample_images
from flora_jax.models.diffusion import DDPM, FlowMatching

MEAN, STD = 0.3, 0.5
X0 = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
NOISE = jax.random.normal(jax.random.key(1), X0.shape)
STEP = jnp.asarray([0, 1, 40, 99])
U = (STEP + 0.5) / 100


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables_are_the_process(schedule):
    """x_t of the closed form is x_{t-1} after one more step, whose posterior the tables hold."""
    process = DDPM(steps=100, schedule=schedule)
    at = process.tables
    assert (np.diff(process.signal) < 0).all() and process.signal[0] > 0.99
    assert process.signal[-1] < 1e-4
    beta = np.exp(at.log_beta.astype(np.float64))
    np.testing.assert_allclose(at.before * (1 - beta), at.signal, rtol=1e-4)
    # Bayes: precisions add, means are weighed by them.
    precision = 1 / (1 - at.before[1:]) + (1 - beta[1:]) / beta[1:]
    np.testing.assert_allclose(np.exp(at.log_variance[1:]), 1 / precision, rtol=1e-3)
    from_x0 = np.sqrt(at.before[1:]) / (1 - at.before[1:]) / precision
    np.testing.assert_allclose(at.mean_x0[1:], from_x0, rtol=2e-3)
    np.testing.assert_allclose(
        at.mean_xt[1:], np.sqrt(1 - beta[1:]) / beta[1:] / precision, rtol=2e-3
    )


def test_fewer_steps_are_the_same_process():
    process = DDPM(steps=100)
    few = process.respaced(10)
    np.testing.assert_allclose(few.signal[-1], process.signal[-1], rtol=1e-6)
    np.testing.assert_allclose(few.before[1:], few.signal[:-1])
    assert few.time[-1] == np.float32(0.99)
    with pytest.raises(ConfigError, match="101 steps for a process of 100"):
        process.respaced(101)


def test_the_bound_is_zero_for_the_truth_and_moves_the_variance_alone():
    process = DDPM(steps=100)
    _, time, state = process.corrupt(X0, NOISE, U)
    np.testing.assert_allclose(time, STEP / 100)
    out = jnp.concatenate([NOISE, -jnp.ones_like(NOISE)], axis=-1)
    terms = process.terms(out, state)
    np.testing.assert_allclose(terms["noise"], 0, atol=1e-12)
    np.testing.assert_allclose(terms["vlb"][1:], 0, atol=1e-5)
    wrong = out.at[..., 0].add(0.1)
    grad = jax.grad(lambda o: process.terms(o, state)["vlb"].sum())(wrong)
    assert not np.any(grad[..., 0]) and np.abs(grad[..., 1]).max() > 0
    plain = dataclasses.replace(process, vlb=False).terms(wrong, state)
    assert plain.keys() == {"noise"}
    np.testing.assert_allclose(plain["noise"], 0.01, rtol=1e-5)


def test_distilled_variance_moves_the_variance_alone():
    process = DDPM(steps=100)
    _, _, state = process.corrupt(X0, NOISE, U)
    student, teacher = (jax.random.normal(jax.random.key(i), (4, 2, 2, 2)) for i in (2, 3))
    grad = jax.grad(lambda o: process.match(o, teacher, state)["match_variance"].sum())(student)
    assert not np.any(grad[..., 0]) and np.abs(grad[..., 1]).min(axis=(1, 2)).max() > 0
    assert not any(np.any(v) for v in process.match(teacher, teacher, state).values())
    # Sigma at v = -1 and v = 1 is the posterior's variance and beta.
    at = process.tables
    for raw, table in ((-1.0, at.log_variance), (1.0, at.log_beta)):
        found = process.log_variance(jnp.full(X0.shape, raw), at, STEP)
        np.testing.assert_allclose(found[:, 0, 0, 0], table[STEP], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best predictor for pixels N(MEAN, STD^2), independent; it learns no variance."""

    process: DDPM | FlowMatching
    config = types.SimpleNamespace(num_channels=1, num_classes=3)

    def apply(self, variables, x, time, labels):
        time = time.reshape(-1, 1, 1, 1)
        if isinstance(self.process, DDPM):
            step = jnp.round(time * self.process.steps).astype(int)
            signal = jnp.asarray(self.process.tables.signal)[step]
            keep, spoil = jnp.sqrt(signal), jnp.sqrt(1 - signal)
        else:
            keep, spoil = 1 - time, time
        variance = keep**2 * STD**2 + spoil**2
        eps = spoil * (x - keep * MEAN) / variance
        x0 = MEAN + keep * STD**2 * (x - keep * MEAN) / variance
        return eps if isinstance(self.process, DDPM) else eps - x0


@pytest.mark.parametrize(
    ("process", "options"),
    [
        (DDPM(steps=200), {}),
        (DDPM(steps=200), {"sampler": "ddim", "steps": 100}),
        (DDPM(steps=200), {"sampler": "ddim", "eta": 1.0}),
        (FlowMatching(), {"steps": 100}),
    ],
    ids=["ancestral", "ddim", "ddim-eta-1", "euler"],
)
def test_samplers_draw_the_distribution_of_the_best_predictor(process, options):
    labels = jnp.zeros(16, int)
    draws = sample_images(
        Best(process), {}, process, jax.random.key(0), labels, size=(16, 16), **options
    )
    assert draws.shape == (16, 16, 16, 1)
    assert abs(float(draws.mean()) - MEAN) < 0.03  # 4096 pixels: three deviations are 0.023
    assert abs(float(draws.std()) - STD) < 0.04


def test_unknown_samplers_are_named():
    process = FlowMatching()
    with pytest.raises(ConfigError, match="sampler of FlowMatching 'ddim'.*euler"):
        sample_images(
            Best(process), {}, process, jax.random.key(0), jnp.zeros(1, int), size=(2, 2),
            sampler="ddim",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDPM(schedule="cosin"), "'cosin'.*cosine"),
        (lambda: DDPM(steps=20), "steps=20"),
        (lambda: FlowMatching().check(True), "learned_variance=False"),
    ],
)
def test_wrong_processes_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
