"""Small language models over bytes, trained from scratch on one text, to be adapted to another."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flora_jax.core.errors import ConfigError
from flora_jax.io.tokenizer import Tokenizer
from flora_jax.launch.first_task import Pretraining, Retention, kept, trained
from flora_jax.launch.subjects import Source, Subject
from flora_jax.models import registry
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.training.losses import Answers, CausalLM, Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallLanguageModel(Source):
    """A small Llama over bytes (no file is needed), trained on a first text if there is one.

    Args:
      config: the architecture; the vocabulary is the tokenizer's 257.
      pretraining: the first text (``TextData``); without it the base is random.
      answers: the texts are prompts with one right answer: trained and judged by whole answers,
        ``accuracy`` and ``nll`` of each (``training.losses.Answers``).
      seed: of the initial values and of the pretraining's order.
    """

    config: LlamaConfig
    pretraining: Pretraining | None = None
    answers: bool = False
    seed: int = 0

    @property
    def loss(self) -> Loss:
        """What is trained and judged."""
        return (Answers if self.answers else CausalLM)(model=self.model)

    @property
    def model(self) -> Llama:
        """The module."""
        eos = Tokenizer.byte_level().eos_id
        return Llama(dataclasses.replace(self.config, vocab_size=eos + 1, eos_token_id=eos))

    def load(self, data, folder=None):
        tokenizer, loss = Tokenizer.byte_level(), self.loss
        name, retention = "random byte-level Llama", None
        if self.pretraining:
            first = self.pretraining.data
            name = f"byte-level Llama pretrained on {first.source}"
            retention = Retention(loss, {}, first, tokenizer)
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
    model = source.model
    params = jax.jit(lambda key: registry.init(model, key))(jax.random.key(source.seed))
    if source.pretraining is None:
        return params
    if source.pretraining.steps < 1:
        raise ConfigError(f"Pretraining.steps={source.pretraining.steps} must be positive")
    loss, tokenizer = source.loss, Tokenizer.byte_level()
    return trained(loss, params, source.pretraining, source.seed, tokenizer)
