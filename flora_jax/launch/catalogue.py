"""What gin files may name: every adapter, optimizer, schedule, data set, model and entry point."""

from __future__ import annotations

import functools

import flora_jax.adapters  # noqa: F401  fills the registry of methods
from flora_jax import config
from flora_jax.core.registry import methods
from flora_jax.training import optim, schedules

OPTIMIZERS = (optim.AdamW, optim.SGD, optim.Lion, optim.Adafactor, optim.Groups, optim.lora_plus)
SCHEDULES = (
    schedules.Constant,
    schedules.Linear,
    schedules.Cosine,
    schedules.Warmup,
    schedules.Scaled,
)


@functools.cache
def register_all() -> None:
    """Registers everything with gin, once; called before any file is parsed."""
    for method in methods("adapter"):
        config.register(method.cls, name=method.name)
    for thing in (*OPTIMIZERS, *SCHEDULES):
        config.register(thing)
