"""Small image generators: a DiT trained from scratch on one set of images, or to be adapted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flora_jax.data import ImageData
from flora_jax.launch.first_task import Pretraining, kept, trained
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models import registry
from flora_jax.models.diffusion import Process
from flora_jax.models.dit import DiT
from flora_jax.models.dit_config import DiTConfig
from flora_jax.training.denoising import Denoising


class GeneratorSubject(Subject):
    """A generator, judged by what its loss is made of on held-out images.

    ``noise_mse`` is the squared error of the predicted noise (of the velocity for a flow).
    """

    def figures(self, means):
        names = {"noise": "noise_mse"}
        return {names.get(name, name): value for name, value in means.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallGenerator(Source):
    """A DiT of the given sizes, trained on a first set of images if there is one.

    Images should lie in [-1, 1]: ``ImageData`` with ``mean`` and ``std`` one half.

    Args:
      config: the architecture; the channels are those of the data.
      process: ``DDPM`` or ``FlowMatching``.
      pretraining: the first task; without it the base is random (train all of it: ``Replace``).
      class_dropout: see ``training.Denoising``.
      draws: noise levels that each held-out image is judged at.
      seed: of the initial values and of the pretraining's order.
    """

    config: DiTConfig
    process: Process
    pretraining: Pretraining | None = None
    class_dropout: float = 0.1
    draws: int = 4
    seed: int = 0

    def model(self, data: ImageData) -> DiT:
        """The module for a set of images."""
        channels = data.arrays("test")[0].shape[-1]
        return DiT(dataclasses.replace(self.config, num_channels=channels))

    def loss(self, model: DiT, **more: Any) -> Denoising:
        """What is trained and judged."""
        how = {"class_dropout": self.class_dropout, "draws": self.draws}
        return Denoising(model=model, process=self.process, **how, **more)

    def load(self, data, folder=None):
        model, name = self.model(data), "random DiT"
        if self.pretraining:
            name = f"DiT pretrained on {self.pretraining.data.source}"
        params = kept(folder, lambda: base(self, model))
        return GeneratorSubject(model, params, self.loss(model), name)


@functools.lru_cache(maxsize=8)
def base(source: SmallGenerator, model: DiT) -> Any:
    """The base, made once a process: the runs of a sweep share it."""
    params = registry.init(model, jax.random.key(source.seed))
    if source.pretraining is None:
        return params
    return trained(source.loss(model), params, source.pretraining, source.seed)
