"""What gin files may name: every adapter, optimizer, schedule, data set, model and entry point."""

from __future__ import annotations

import functools

import flora_jax.adapters  # noqa: F401  fills the registry of methods
import flora_jax.attention  # noqa: F401
from flora_jax import config, data
from flora_jax.attention.quantum import StaticVQC
from flora_jax.core.registry import methods
from flora_jax.launch import (
    first_task,
    generators,
    pretrained,
    series,
    small_text,
    students,
    subjects,
)
from flora_jax.launch import train as train  # registers the entry point
from flora_jax.models.conv import ConvNetConfig
from flora_jax.models.diffusion import DDPM, FlowMatching
from flora_jax.models.dit_config import DiTConfig
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.models.mlp import MLPConfig
from flora_jax.models.rope import Rope
from flora_jax.models.vit_config import ViTConfig
from flora_jax.quant import Format
from flora_jax.training import EarlyStopping, TeacherMatching, optim, schedules

OPTIMIZERS = (
    optim.AdamW,
    optim.SGD,
    optim.RMSprop,
    optim.Lion,
    optim.Adafactor,
    optim.Groups,
    optim.lora_plus,
)
# Registered methods that gin files name.
FAMILIES = ("adapter", "attention", "optimizer", "projection")
SCHEDULES = (
    schedules.Constant,
    schedules.Linear,
    schedules.Cosine,
    schedules.Warmup,
    schedules.Scaled,
)
DATA = (
    data.TextData,
    data.ClassificationData,
    data.ImageData,
    data.ImageNames,
    data.SequenceTask,
    data.TeacherStudent,
    data.ConvTeacherStudent,
    data.Series,
    data.Fields,
)
MODELS = (
    subjects.LanguageModel,
    subjects.TextClassifier,
    subjects.ImageClassifier,
    pretrained.SmallImageModel,
    small_text.SmallLanguageModel,
    first_task.Pretraining,
    students.Student,
    series.SmallSeriesModel,
    StaticVQC,
    MLPConfig,
    ConvNetConfig,
    ViTConfig,
    generators.SmallGenerator,
    generators.ConvertedGenerator,
    DiTConfig,
    DDPM,
    FlowMatching,
    TeacherMatching,
    LlamaConfig,
    Rope,
    Format,
    EarlyStopping,
)


@functools.cache
def register_all() -> None:
    """Registers everything with gin, once; called before any file is parsed."""
    for method in (m for family in FAMILIES for m in methods(family)):
        config.register(method.cls, name=method.name)
    for thing in (*OPTIMIZERS, *SCHEDULES, *DATA, *MODELS):
        config.register(thing)
