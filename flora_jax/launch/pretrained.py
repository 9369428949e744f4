"""Small image models trained from scratch on one task, to be adapted to another.

The digits bench: a model learns classes 0-4 with all its weights, is frozen, and is adapted to
classes 5-9 with a fresh head. What it keeps of the old task is its *retention*: the accuracy of the
adapted body under the old head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError
from flora_jax.data import ImageData
from flora_jax.launch.first_task import Pretraining, Retention, kept, trained
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models.conv import ConvNet, ConvNetConfig
from flora_jax.models.mlp import MLP, MLPConfig
from flora_jax.models.vit import ViT
from flora_jax.models.vit_config import ViTConfig
from flora_jax.training.losses import Classification

HEADS = ("head", "classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallImageModel(Source):
    """An MLP, ConvNet or ViT of the given sizes, trained on a first task if there is one.

    The input size and the number of classes are those of the data.

    Args:
      config: ``MLPConfig``, ``ConvNetConfig`` or ``ViTConfig``.
      pretraining: the first task; without it the base is random (train all of it: ``Replace``).
      seed: of the initial values and of the pretraining's order.
    """

    config: MLPConfig | ConvNetConfig | ViTConfig
    pretraining: Pretraining | None = None
    seed: int = 0

    def load(self, data, folder=None):
        shape = data.arrays("test")[0].shape[1:]
        first = self.pretraining.data if self.pretraining else data
        old, new = (build(self.config, shape, task.num_classes) for task in (first, data))
        params = base = kept(folder, lambda: self.base(shape, data.num_classes))
        name = type(self.config).__name__.removesuffix("Config")
        if self.pretraining:
            fresh = _initial(new, shape, self.seed + 1)
            params = {**base, **{h: fresh[h] for h in HEADS if h in fresh}}
            name += f" pretrained on {first.source} {_classes(first)}"
        loss = Classification(model=new)
        retention = None
        if self.pretraining:
            heads = {h: base[h] for h in HEADS if h in base}
            retention = Retention(Classification(model=old), heads, first)
        return Subject(new, params, loss, name, retention=retention)

    def base(self, shape: tuple[int, ...], num_classes: int) -> Any:
        """The base for images of a shape; experiments override it."""
        return _pretrained(self, shape, num_classes)


class Flattened:
    """An MLP that takes images ``[B, H, W, C]``."""

    def __init__(self, mlp: MLP):
        self.config, self._mlp = mlp.config, mlp

    def init(self, key: jax.Array, images: jax.Array) -> Any:
        return self._mlp.init(key, images.reshape(len(images), -1))

    def apply(self, variables: Any, images: jax.Array, **options: Any) -> Any:
        return self._mlp.apply(variables, images.reshape(len(images), -1), **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flattened) and self._mlp == other._mlp

    def __hash__(self) -> int:
        return hash(self._mlp)


def build(config: Any, shape: tuple[int, int, int], num_classes: int) -> Any:
    """The model of a configuration for images ``[H, W, C]`` and so many classes."""
    if isinstance(config, MLPConfig):
        sizes = (int(np.prod(shape)), *config.sizes[1:-1], num_classes)
        return Flattened(MLP(dataclasses.replace(config, sizes=sizes)))
    config = dataclasses.replace(config, num_labels=num_classes)
    if isinstance(config, ConvNetConfig):
        return ConvNet(dataclasses.replace(config, image_shape=tuple(shape)))
    if shape[0] != shape[1]:
        raise ConfigError(f"a ViT takes square images, not {shape}")
    return ViT(dataclasses.replace(config, image_size=shape[0], num_channels=shape[2]))


def _initial(model: Any, shape: tuple[int, ...], seed: int) -> Any:
    # jit: operation by operation the scanned blocks of a ViT would compile one by one.
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, *shape)))["params"])
    return init(jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _pretrained(source: SmallImageModel, shape: tuple[int, ...], num_classes: int) -> Any:
    """The base, made once a process: the runs of a sweep share it."""
    how = source.pretraining
    model = build(source.config, shape, how.data.num_classes if how else num_classes)
    params = _initial(model, shape, source.seed)
    if how is None:
        return params
    return trained(Classification(model=model), params, how, source.seed)


def _classes(data: ImageData) -> str:
    return "" if data.classes is None else f"classes {','.join(map(str, data.classes))}"
