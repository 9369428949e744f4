"""Small image generators: a DiT trained from scratch on one set of images, or to be adapted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flora_jax.core.registry import name_of
from flora_jax.data import ImageData
from flora_jax.launch.first_task import Pretraining, kept, trained
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models import registry
from flora_jax.models.convert import convert_attention
from flora_jax.models.diffusion import Process
from flora_jax.models.dit import DiT
from flora_jax.models.dit_config import DiTConfig
from flora_jax.training.denoising import TEACHER, Denoising, TeacherMatching


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedGenerator(Source):
    """A DiT of other attention that inherits from a trained one, which may go on teaching it.

    Args:
      teacher: the trained one.
      config: of the new one; its process is the teacher's.
      anew: regexes of the teacher's parameters that are not passed on: all of the attention for
        LiT, none for SLA, ``.*`` for a start from nothing.
      distillation: how the teacher's predictions are matched; None trains without it.
      seed: of what starts anew.
    """

    teacher: SmallGenerator
    config: DiTConfig
    anew: tuple[str, ...] = ()
    distillation: TeacherMatching | None = None
    seed: int = 0

    def model(self, data: ImageData) -> DiT:
        """The new module for a set of images."""
        return dataclasses.replace(self.teacher, config=self.config).model(data)

    def load(self, data, folder=None):
        student, teacher = self.model(data), self.teacher.model(data)
        params = kept(folder, lambda: self._base(student, teacher))
        name, taught = f"DiT with {name_of(self.config.attention)} attention", {}
        if self.distillation is not None:
            taught = {"teacher": teacher, "distillation": self.distillation}
        loss = self.teacher.loss(student, **taught)
        beside = (TEACHER,) if taught else ()
        return GeneratorSubject(student, params, loss, name, beside=beside)

    def _base(self, student: DiT, teacher: DiT) -> dict[str, Any]:
        old = base(self.teacher, teacher)
        fields = {f.name: getattr(student.config, f.name) for f in dataclasses.fields(DiTConfig)}
        to, key = fields.pop("attention"), jax.random.key(self.seed)
        rules = dict.fromkeys(self.anew)
        params = convert_attention(old, teacher, rules, to=to, key=key, **fields).params
        return params | ({TEACHER: old} if self.distillation is not None else {})
