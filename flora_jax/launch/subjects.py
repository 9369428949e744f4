"""What a run adapts: a model with its parameters, tokenizer, loss and the figures it is judged by.

A *source* is a small frozen dataclass that gin can build (``train.model = @LanguageModel()``); it
loads a :class:`Subject`. Nothing is read before :meth:`load`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from flora_jax import io
from flora_jax.attention import Distil, Variant
from flora_jax.core.errors import ConfigError
from flora_jax.launch import native
from flora_jax.models import heads
from flora_jax.models.convert import convert_attention
from flora_jax.training.losses import CausalLM, Classification, Distillation, Loss


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loaded model.

    Args:
      model: the Linen module.
      params: the frozen base.
      loss: of one batch; see ``flora_jax.training.losses``.
      name: where the base came from, for people.
      tokenizer: for texts; None for images.
      generates: whether it writes text.
      retention: figures of the task the base was made for, of bound parameters; None if unknown.
      beside: components of ``params`` that only the loss reads, such as a teacher: never adapted,
        not part of what is counted and saved.
    """

    model: nn.Module
    params: Any
    loss: Loss
    name: str
    tokenizer: Any = None
    generates: bool = False
    retention: Callable[[Any], dict[str, float]] | None = None
    beside: tuple[str, ...] = ()

    def own(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The model's parameters alone."""
        return {name: leaf for name, leaf in params.items() if name not in self.beside}

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means over the held-out data as the figures a run reports.

        ``perplexity = exp(nll)`` for language models, ``accuracy`` in per cent for classifiers.
        """
        if self.generates:
            perplexity = math.exp(min(means["nll"], 700.0))
            return {"perplexity": perplexity, "token_accuracy": 100 * means["accuracy"]}
        return {"accuracy": 100 * means["accuracy"], "nll": means["nll"]}


class Source:
    """Base class of what ``train.model`` may be."""

    def load(self, data: Any, folder: Path | None = None) -> Subject:
        """The subject.

        Args:
          data: the run's data; a classifier asks it for the number of classes.
          folder: the run's folder: what cannot be loaded again is kept there.
        """
        raise NotImplementedError


def open_model(source: str, dtype: str, options: Mapping[str, Any]) -> tuple[nn.Module, Any, Any]:
    """``(model, params, tokenizer or None)`` of a named model, a folder of any format or a file."""
    if native.is_native(source):
        return native.load(source, **options)
    return tuple(io.load(source, dtype=dtype, **options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel(Source):
    """A causal language model.

    Args:
      source: a named model (``smollm2-135m``), a Hugging Face folder or a GGUF file.
      dtype: of the base parameters.
      layers: use only the first so many blocks (for trials on a small machine).
      remat: what is recomputed in the backward pass: ``dots`` all but matrix products (less memory
        than ``none`` and, on a CPU, no slower), ``full`` whole blocks, ``none``.
      attention: converted to this variant (``flora_jax.convert_attention``). ``Distil`` makes the
        run a distillation of its student.
      attention_seed: of the parameters that are new.
      mse: of a distillation: weight of the heads' outputs' squared error, see
        ``training.losses.Distillation``.
      xent: of a distillation: weight of the attention weights' cross-entropy.
    """

    source: str = "smollm2-135m"
    dtype: str = "float32"
    layers: int | None = None
    remat: str = "dots"
    attention: Variant | None = None
    attention_seed: int = 0
    mse: float = 0.0
    xent: float = 1.0

    def load(self, data, folder=None):
        model, params, tokenizer = open_model(self.source, self.dtype, {"remat": self.remat})
        if self.layers is not None:
            model, params = first_layers(model, params, self.layers)
        model, params = converted(model, params, self.attention, self.attention_seed)
        if isinstance(model.config.attention, Distil):
            loss = Distillation(model=model, xent=self.xent, mse=self.mse)
            return DistilledSubject(model, params, loss, self.source, tokenizer, generates=True)
        loss = CausalLM(model=model)
        return Subject(model, params, loss, self.source, tokenizer, generates=True)


def converted(
    model: nn.Module, params: Any, attention: Variant | None, seed: int
) -> tuple[nn.Module, Any]:
    """The model with another attention, which is reported; None leaves it as it is."""
    if attention is None:
        return model, params
    key = jax.random.key(seed)
    model, params, report = convert_attention(params, model, to=attention, key=key)
    print(report, file=sys.stderr)
    return model, params


class DistilledSubject(Subject):
    """A model that is judged by how well the students of its attention follow it."""

    def figures(self, means):
        return {name: means[name] for name in ("xent", "mse")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassifier(Source):
    """A text encoder with a fresh classification head.

    Args:
      source: a named model (``minilm-l6``) or a Hugging Face folder.
      pooling: what the head reads: ``mean``, ``cls`` or ``pooler``.
      dtype: of the base parameters.
      head_seed: of the head's initial values.
      attention, attention_seed, mse, xent: as of :class:`LanguageModel`.
    """

    source: str = "minilm-l6"
    pooling: str = "mean"
    dtype: str = "float32"
    head_seed: int = 0
    attention: Variant | None = None
    attention_seed: int = 0
    mse: float = 0.0
    xent: float = 1.0

    def load(self, data, folder=None):
        model, params, tokenizer = open_model(self.source, self.dtype, {})
        key = jax.random.key(self.head_seed)
        changes = {"pooling": self.pooling, "use_pooler": self.pooling == "pooler"}
        model, params = heads.with_head(model, params, data.num_classes, key, **changes)
        model, params = converted(model, params, self.attention, self.attention_seed)
        inputs = ("tokens", "mask", "token_types")
        if isinstance(model.config.attention, Distil):
            loss = Distillation(model=model, inputs=inputs, xent=self.xent, mse=self.mse)
            return DistilledSubject(model, params, loss, self.source, tokenizer)
        loss = Classification(model=model, inputs=inputs)
        return Subject(model, params, loss, self.source, tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassifier(Source):
    """A pretrained vision transformer with a fresh classification head.

    Args:
      source: a named model or a Hugging Face folder.
      pooling: what the head reads: ``cls``, ``mean`` or ``cls_mean``.
      dtype: of the base parameters.
      head_seed: of the head's initial values.
    """

    source: str
    pooling: str = "cls_mean"
    dtype: str = "float32"
    head_seed: int = 0

    def load(self, data, folder=None):
        model, params, _ = open_model(self.source, self.dtype, {})
        key = jax.random.key(self.head_seed)
        model, params = heads.with_head(model, params, data.num_classes, key, pooling=self.pooling)
        return Subject(model, params, Classification(model=model), self.source)


def first_layers(model: nn.Module, params: Any, count: int) -> tuple[nn.Module, Any]:
    """The model with only its first ``count`` scanned blocks.

    Raises:
      ConfigError: it has fewer.
    """
    total = model.config.num_hidden_layers
    if not 1 <= count <= total:
        raise ConfigError(f"LanguageModel.layers={count} is outside 1..{total}")
    config = dataclasses.replace(model.config, num_hidden_layers=count)
    layers = jax.tree.map(lambda x: x[:count], params["layers"])
    return model.clone(config=config), {**params, "layers": layers}
