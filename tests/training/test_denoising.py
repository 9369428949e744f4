"""The loss of image generators: what is summed, what a teacher adds, how it is judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.models import DDPM, DiT, DiTConfig, FlowMatching, registry
from flora_jax.training import Denoising, TeacherMatching

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "frequencies": 8}
BATCH = {
    "image": jax.random.normal(jax.random.key(5), (4, 4, 4, 1)),
    "label": jnp.asarray([0, 1, 2, 3]),
    "weight": jnp.asarray([1.0, 1.0, 1.0, 0.0]),
}


call = jax.jit(
    lambda loss, bound, batch, rng, train: loss(bound, batch, rng, train), static_argnums=(0, 4)
)


def network(seed, **changes):
    """A network none of whose weights is zero; made with NumPy, so that nothing compiles."""
    model, rng = DiT(DiTConfig.tiny(**SMALL, **changes)), np.random.default_rng(seed)
    fill = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return model, jax.tree.map(fill, registry.abstract(model))


@pytest.fixture(scope="module")
def pair():
    """A student and a frozen teacher beside it."""
    (model, student), (_, teacher) = network(0), network(1)
    return model, {**student, "teacher": teacher}


def test_sums_ignore_padding_and_the_judge_sees_the_same_noise_twice(pair):
    model, bound = pair
    loss = Denoising(model=model, process=DDPM(steps=50), draws=3)
    total, weight, aux = call(loss, bound, BATCH, None, False)
    assert weight == 9 and aux.keys() == {"noise", "vlb"}
    np.testing.assert_allclose(total, aux["noise"] + aux["vlb"], rtol=1e-6)
    assert call(loss, bound, BATCH, None, False)[0] == total
    # Padding changes the noise of the batch, not what is counted.
    whole = {**BATCH, "weight": jnp.ones(4)}
    assert call(loss, bound, whole, None, False)[1] == 12


def test_training_noise_follows_the_key_and_labels_are_dropped(pair):
    model, bound = pair
    loss = Denoising(model=model, process=DDPM(steps=50), class_dropout=0.99)
    at = lambda loss, seed: call(loss, bound, BATCH, jax.random.key(seed), True)[0]
    assert at(loss, 0) == at(loss, 0) != at(loss, 1)
    assert at(loss, 0) != at(dataclasses.replace(loss, class_dropout=0.0), 0)


def test_the_parts_of_a_taught_loss(pair):
    """Without weight on the teacher the plain loss; the parts add up with their weights."""
    model, bound = pair
    plain = Denoising(model=model, process=DDPM(steps=50))
    taught = dataclasses.replace(
        plain, teacher=model, distillation=TeacherMatching(noise=0.0, variance=0.0)
    )
    rng = jax.random.key(0)
    expected = call(plain, bound, BATCH, rng, True)[0]
    total, _, aux = call(taught, bound, BATCH, rng, True)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    weights = TeacherMatching(data=0.5, noise=2.0, variance=3.0)
    mixed = call(dataclasses.replace(taught, distillation=weights), bound, BATCH, rng, True)[0]
    parts = 0.5 * expected + 2 * aux["match_noise"] + 3 * aux["match_variance"]
    np.testing.assert_allclose(mixed, parts, rtol=1e-5)


def test_the_teacher_is_frozen_and_a_student_like_it_has_nothing_to_learn(pair):
    model, bound = pair
    distillation = TeacherMatching(data=0.0, noise=1.0, variance=1.0)
    loss = Denoising(
        model=model, process=DDPM(steps=50), teacher=model, distillation=distillation
    )
    value = jax.jit(jax.value_and_grad(lambda b: loss(b, BATCH, jax.random.key(0), True)[0]))
    grad = value(bound)[1]
    assert not any(np.any(g) for g in jax.tree.leaves(grad.pop("teacher")))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
    twin = {**bound["teacher"], "teacher": bound["teacher"]}
    assert value(twin)[0] == 0


def test_flow_matching_has_a_velocity_and_no_variance():
    model, bound = network(0, learned_variance=False)
    total, weight, aux = call(
        Denoising(model=model, process=FlowMatching()), bound, BATCH, None, False
    )
    assert aux.keys() == {"noise"} and weight == 3
    np.testing.assert_allclose(total, aux["noise"])


def test_wrong_losses_are_named():
    model = DiT(DiTConfig.tiny(**SMALL))
    with pytest.raises(ConfigError, match="class_dropout=1"):
        Denoising(model=model, process=DDPM(), class_dropout=1.0)
    with pytest.raises(ConfigError, match="learned_variance=False"):
        Denoising(model=model, process=FlowMatching())
