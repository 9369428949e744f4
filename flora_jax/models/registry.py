"""One table of architectures: from a Hugging Face ``config.json`` to one of our modules.

An architecture is registered under the names that Hugging Face gives it, the class
(``LlamaForCausalLM``) or the ``model_type`` (``llama``); the class name is tried first. A model in
the table has a ``config`` field, a ``to_hf()`` method that gives the ``config.json`` back, and
``dummy_inputs()``: the arguments that ``init`` needs, as small as they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flora_jax.core.errors import ConfigError, unknown

Builder = Callable[..., nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register(*names: str) -> Callable[[Builder], Builder]:
    """Register ``build(hf_config, **options) -> module`` under Hugging Face names.

    Raises:
      ConfigError: a name is taken.
    """

    def decorate(build: Builder) -> Builder:
        for name in names:
            if name in _BUILDERS:
                raise ConfigError(f"architecture {name!r} is registered twice")
            _BUILDERS[name] = build
        return build

    return decorate


def hf_names(config: Mapping[str, Any]) -> list[str]:
    """The names by which a ``config.json`` says what it is, the most specific first.

    >>> hf_names({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    ['LlamaForCausalLM', 'llama']
    """
    names = [*(config.get("architectures") or ()), config.get("model_type")]
    return [name for name in names if isinstance(name, str)]


def find(table: Mapping[str, Any], config: Mapping[str, Any], what: str = "architecture") -> Any:
    """The entry of a table keyed by Hugging Face names that fits a ``config.json``.

    Raises:
      ConfigError: no entry fits.
    """
    names = hf_names(config)
    for name in names:
        if name in table:
            return table[name]
    raise ConfigError(unknown(what, " / ".join(names) or "(no model_type)", table))


def build(config: Mapping[str, Any], **options: Any) -> nn.Module:
    """Our module for a Hugging Face ``config.json``; options go to the module (``remat`` ...).

    >>> model = build({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    ...                "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 96})
    >>> model.config.head_dim
    16
    """
    return find(_BUILDERS, config)(config, **options)


def architectures() -> list[str]:
    """Every registered name."""
    return sorted(_BUILDERS)


def init(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of a model of the table, made in one compiled program."""
    return jax.jit(lambda key: model.init(key, *model.dummy_inputs())["params"])(key)


def abstract(model: nn.Module) -> dict[str, Any]:
    """The parameters' shapes and dtypes; nothing is computed."""
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
