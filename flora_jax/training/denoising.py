"""The loss of image generators: noise an image, predict, compare; with or without a teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError
from flora_jax.models.diffusion import Process
from flora_jax.training.losses import Sums, inputs_of, weights_of

TEACHER = "teacher"
"""Component of the parameters where a frozen teacher lies, beside those of the student."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherMatching:
    """How much each part of a student's loss counts.

    LiT's hybrid distillation (arXiv 2501.12976) is the default; ``data=0, noise=1, variance=0`` is
    the "white-box" matching of SLA's fine-tuning, without the images' own loss.

    Args:
      data: of the loss without a teacher.
      noise: of the squared difference of the predicted noise (or velocity).
      variance: of the squared difference of the learned variances.
    """

    data: float = 1.0
    noise: float = 0.5
    variance: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """The loss of a noise process; batch keys ``image [B,H,W,C]``, ``label``, ``weight [B]``.

    ``aux`` has the sums ``noise`` (squared error of the noise or velocity), ``vlb`` and, with a
    teacher, ``match_noise`` and ``match_variance``. A held-out batch is judged at noise levels
    spread evenly and at noise that only depends on its images, so that two models see the same.

    Args:
      model: ``model.apply({"params": p}, x_t, time, labels)`` gives what the process asks for.
      process: ``DDPM`` or ``FlowMatching``.
      class_dropout: share of the training labels replaced by "no class", for guided sampling.
      draws: noise levels a held-out image is judged at.
      teacher: a network whose parameters are the component ``teacher`` of the bound ones: frozen
        there, it sees the same noisy images.
      distillation: with a teacher, the weights of the parts.
    """

    model: Any
    process: Process
    class_dropout: float = 0.1
    draws: int = 1
    teacher: Any = None
    distillation: TeacherMatching = TeacherMatching()

    def __post_init__(self):
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"class_dropout={self.class_dropout} must be in [0, 1)")
        if self.draws < 1:
            raise ConfigError(f"draws={self.draws} must be at least 1")
        for model in (m for m in (self.model, self.teacher) if m is not None):
            self.process.check(model.config.learned_variance)

    def positions(self, batch, *, trained: bool) -> jax.Array:
        """1 where a row ``[B]`` is not padding."""
        return (weights_of(batch, batch["image"]) > 0).astype(jnp.float32)

    def __call__(self, bound, batch, rng, train) -> Sums:
        (x0,) = inputs_of(batch, ("image",))
        weight = weights_of(batch, x0)
        labels = batch.get("label") if self.model.config.num_classes else None
        if not train and self.draws > 1:
            again = lambda x: None if x is None else jnp.repeat(x, self.draws, axis=0)
            x0, weight, labels = again(x0), again(weight), again(labels)
        key = _key_of(x0) if rng is None else rng
        noise_key, time_key, label_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, x0.shape)
        u = jax.random.uniform(time_key, weight.shape) if train else _spread(len(weight))
        if train and labels is not None and self.class_dropout:
            dropped = jax.random.bernoulli(label_key, self.class_dropout, labels.shape)
            labels = jnp.where(dropped, self.model.config.num_classes, labels)
        x_t, time, state = self.process.corrupt(x0, noise, u)
        student = {name: leaf for name, leaf in bound.items() if name != TEACHER}
        out = self.model.apply({"params": student}, x_t, time, labels)
        terms = self.process.terms(out, state)
        loss = sum(terms.values())
        if self.teacher is not None:
            ideal = self.teacher.apply({"params": bound[TEACHER]}, x_t, time, labels)
            matched = self.process.match(out, jax.lax.stop_gradient(ideal), state)
            loss = self.distillation.data * loss + sum(
                getattr(self.distillation, name.removeprefix("match_")) * value
                for name, value in matched.items()
            )
            terms |= matched
        aux = {name: jnp.sum(weight * value) for name, value in terms.items()}
        return jnp.sum(weight * loss), jnp.sum(weight), aux


def _key_of(images: jax.Array) -> jax.Array:
    """A key made of a batch's pixels; whole numbers, which add up alike on every machine."""
    return jax.random.key(jnp.sum(jnp.round(1000 * images).astype(jnp.int32)))


def _spread(count: int) -> jax.Array:
    """``[count]`` numbers that cover [0, 1) evenly in whatever order they are taken."""
    return jnp.mod(0.5 + jnp.arange(count) * ((math.sqrt(5) - 1) / 2), 1.0)
