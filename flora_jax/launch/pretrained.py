"""Small image models trained from scratch on one task, to be adapted to another.

The digits bench: a model learns classes 0-4 with all its weights, is frozen, and is adapted to
classes 5-9 with a fresh head. What it keeps of the old task is its *retention*: the accuracy of the
adapted body under the old head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax.adapters import Replace
from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten, unflatten
from flora_jax.data import ImageData
from flora_jax.io import safetensors
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models.conv import ConvNet, ConvNetConfig
from flora_jax.models.mlp import MLP, MLPConfig
from flora_jax.models.vit import ViT
from flora_jax.models.vit_config import ViTConfig
from flora_jax.training import create_state, make_step
from flora_jax.training.losses import Classification
from flora_jax.training.optim import AdamW, Optimizer

HEADS = ("head", "classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a base is made.

    Args:
      data: the first task.
      steps, batch_size, optimizer: of its training.
    """

    data: ImageData
    steps: int = 300
    batch_size: int = 64
    optimizer: Optimizer = AdamW(learning_rate=2e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallImageModel(Source):
    """An MLP, ConvNet or ViT of the given sizes, trained on a first task if there is one.

    The input size and the number of classes are those of the data.

    Args:
      config: ``MLPConfig``, ``ConvNetConfig`` or ``ViTConfig``.
      pretraining: the first task; without it the base is random.
      seed: of the initial values and of the pretraining's order.
    """

    config: MLPConfig | ConvNetConfig | ViTConfig
    pretraining: Pretraining | None = None
    seed: int = 0

    def load(self, data, folder=None):
        shape = data.arrays("test")[0].shape[1:]
        first = self.pretraining.data if self.pretraining else data
        old, new = (build(self.config, shape, task.num_classes) for task in (first, data))
        saved = None if folder is None else folder / "base.safetensors"
        if saved is not None and saved.exists():
            trained = unflatten({k: jnp.asarray(v) for k, v in _read(saved).items()})
        else:
            trained = _pretrained(self, shape)
            if saved is not None:
                saved.parent.mkdir(parents=True, exist_ok=True)
                safetensors.save_one(saved, jax.device_get(flatten(trained)))
        name = type(self.config).__name__.removesuffix("Config")
        params = trained
        if self.pretraining:
            fresh = _initial(new, shape, self.seed + 1)
            params = {**trained, **{h: fresh[h] for h in HEADS if h in fresh}}
            name += f" pretrained on {first.source} {_classes(first)}"
        loss = Classification(model=new)
        retention = Retention(old, trained, first) if self.pretraining else None
        return ImageSubject(new, params, loss, name, retention=retention)


@dataclasses.dataclass(frozen=True)
class Retention:
    """The first task: what an adapted body still knows of it under the old head."""

    model: nn.Module
    params: Any
    data: ImageData

    def __call__(self, bound: Any) -> float:
        """Accuracy in per cent on the first task's test images."""
        old = {h: self.params[h] for h in HEADS if h in self.params}
        images, labels = self.data.arrays("test")
        logits = jax.jit(self.model.apply)({"params": {**bound, **old}}, images)
        return float(100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels))


@dataclasses.dataclass(frozen=True)
class ImageSubject(Subject):
    """A subject that also remembers the task it was pretrained on."""

    retention: Retention | None = None


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
def _pretrained(source: SmallImageModel, shape: tuple[int, ...]) -> Any:
    """The base, made once a process: the runs of a sweep share it."""
    how = source.pretraining
    if how is None:
        raise ConfigError("SmallImageModel needs pretraining, or train all of it with Replace()")
    model = build(source.config, shape, how.data.num_classes)
    params = _initial(model, shape, source.seed)
    plan = flora.plan(params, {".*": Replace()})
    adapters = flora.init(plan, jax.random.key(0), params)
    state = create_state(plan, adapters, how.optimizer, source.seed)
    step = make_step(Classification(model=model), plan, how.optimizer)
    batches: Iterator[Mapping[str, Any]] = iter(
        how.data.train(None, how.batch_size, seed=source.seed)
    )
    for _ in range(how.steps):
        state, _ = step(state, params, next(batches))
    return jax.block_until_ready(flora.materialize(flora.bind(params, state.adapters, plan)))


def _read(path: Path) -> Mapping[str, Any]:
    return safetensors.TensorFiles(path)


def _classes(data: ImageData) -> str:
    return "" if data.classes is None else f"classes {','.join(map(str, data.classes))}"
