"""Small language models over bytes, trained from scratch on one text, to be adapted to another."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax

from flora_jax.adapters import Replace
from flora_jax.attention import Distil, Hedgehog, Variant
from flora_jax.core.errors import ConfigError
from flora_jax.io.tokenizer import Tokenizer
from flora_jax.launch.first_task import Pretraining, Retention, kept, trained
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models import registry
from flora_jax.models.convert import convert_attention
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.training.losses import Answers, CausalLM, Distillation, Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallLanguageModel(Source):
    """A small Llama over bytes (no file is needed), trained on a first text if there is one.

    Args:
      config: the architecture; the vocabulary is the tokenizer's 257.
      pretraining: the first text (``TextData``, ``SequenceTask``); without it the base is random.
      answers: the texts are prompts with one right answer: trained and judged by whole answers,
        ``accuracy`` and ``nll`` of each (``training.losses.Answers``).
      seed: of the initial values and of the pretraining's order.
      attention: the base, once pretrained, is converted to this variant
        (``flora_jax.convert_attention``); what is retained, before and after, is the converted
        model's.
      distillation: how the variant's maps are trained first, alone, to weigh keys as the base's
        softmax does (``attention.Distil``; ``Hedgehog`` and ``LoLCATs`` have such maps).
    """

    config: LlamaConfig
    pretraining: Pretraining | None = None
    answers: bool = False
    seed: int = 0
    attention: Variant | None = None
    distillation: Pretraining | None = None

    def __post_init__(self):
        if self.distillation is None or isinstance(self.attention, Hedgehog):
            return
        if self.attention is None:
            raise ConfigError("SmallLanguageModel.distillation needs an attention to convert to")
        raise ConfigError(
            f"SmallLanguageModel.distillation: {type(self.attention).__name__} has no maps to "
            "distil; Hedgehog and LoLCATs have"
        )

    @property
    def loss(self) -> Loss:
        """What is trained and judged."""
        return (Answers if self.answers else CausalLM)(model=self.model)

    @property
    def model(self) -> Llama:
        """The module, converted if it is to be."""
        eos = Tokenizer.byte_level().eos_id
        config = dataclasses.replace(self.config, vocab_size=eos + 1, eos_token_id=eos)
        if self.attention is not None:
            config = dataclasses.replace(config, attention=self.attention)
        return Llama(config)

    def load(self, data, folder=None):
        tokenizer, loss = Tokenizer.byte_level(), self.loss
        name, retention = "random byte-level Llama", None
        if self.pretraining:
            first = self.pretraining.data
            name = f"byte-level Llama pretrained on {first.source}"
            retention = Retention(loss, {}, first, tokenizer)
        if self.attention is not None:
            name += f", converted to {type(self.attention).__name__}"
        params = kept(folder, self.base)
        kind = AnsweringSubject if self.answers else Subject
        return kind(self.model, params, loss, name, tokenizer, True, retention)

    def base(self) -> Any:
        """The frozen base; experiments override it."""
        return _base(self)


class AnsweringSubject(Subject):
    """A language model that is judged by its answers."""

    def figures(self, means):
        return {"accuracy": 100 * means["accuracy"], "nll": means["nll"]}


@functools.lru_cache(maxsize=8)
def _base(source: SmallLanguageModel) -> Any:
    """The base, made once a process: the runs of a sweep share it."""
    if source.attention is not None:
        return _converted(source)
    model = source.model
    params = jax.jit(lambda key: registry.init(model, key))(jax.random.key(source.seed))
    if source.pretraining is None:
        return params
    if source.pretraining.steps < 1:
        raise ConfigError(f"Pretraining.steps={source.pretraining.steps} must be positive")
    loss, tokenizer = source.loss, Tokenizer.byte_level()
    return trained(loss, params, source.pretraining, source.seed, tokenizer)


def _converted(source: SmallLanguageModel) -> Any:
    """The base with another attention, whose maps are distilled if they are to be."""
    first = dataclasses.replace(source, attention=None, distillation=None)
    to, how = source.attention, source.distillation
    model, params, report = convert_attention(
        first.base(),
        first.model,
        to=to if how is None else Distil(student=to),
        key=jax.random.key(source.seed),
    )
    print(report, file=sys.stderr)
    if how is None:
        return params
    maps = {"layers/self_attn/attention/.*": Replace()}
    loss, tokenizer = Distillation(model=model), Tokenizer.byte_level()
    return trained(loss, params, how, source.seed, tokenizer, maps)
