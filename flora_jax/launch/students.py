"""Teacher-student regression: one layer that starts at the known W0 and is to learn the update."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from flora_jax.launch.subjects import Source, Subject
from flora_jax.linen.layers import Conv, Dense
from flora_jax.training.losses import Regression


@dataclasses.dataclass(frozen=True)
class RegressionSubject(Subject):
    """A subject that is judged by its mean squared error."""

    def figures(self, means):
        return {"mse": means["loss"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student(Source):
    """A dense layer or a convolution without bias, for the data ``TeacherStudent`` or
    ``ConvTeacherStudent``; its one weight is ``kernel``.
    """

    def load(self, data, folder=None):
        kernel = jnp.asarray(data.teacher()[0])
        features = kernel.shape[-1]
        if kernel.ndim == 2:
            model = Dense(features, use_bias=False)
        else:
            model = Conv(features, kernel.shape[:-2], padding="VALID", use_bias=False)
        name = f"W0 of {type(data).__name__}, task_seed {data.task_seed}"
        return RegressionSubject(model, {"kernel": kernel}, Regression(model=model), name)
