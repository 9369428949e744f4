"""Changing what a pretrained model ends in: a fresh classification head, or another pooling."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn
import jax

from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import flatten, unflatten
from flora_jax.models import registry

Model = TypeVar("Model", bound=nn.Module)


def with_head(
    model: Model, params: Any, num_labels: int, key: jax.Array, **changes: Any
) -> tuple[Model, dict[str, Any]]:
    """The model with a new head of ``num_labels`` classes on the parameters of its body.

    Every leaf whose place and shape the new configuration keeps is taken as it is; an old
    ``classifier`` is dropped, even one of the same width. Leaves that the new configuration has
    no use for (an unused pooler) are dropped; only the head may be new.

    Args:
      num_labels: classes; 0 takes the head away.
      key: for the head's kernel; its bias is zero.
      changes: other fields of the configuration, e.g. ``pooling="mean"``, ``use_pooler=False``.

    Raises:
      ConfigError: the model's configuration has no ``num_labels``.
      StructureError: the new configuration needs leaves, beside the head, that are not there.

    >>> import jax.numpy as jnp
    >>> from flora_jax.models.bert import Bert, BertConfig
    >>> model = Bert(BertConfig.tiny())
    >>> params = registry.init(model, jax.random.key(0))
    >>> model, params = with_head(model, params, 5, jax.random.key(1), pooling="mean")
    >>> model.apply({"params": params}, jnp.ones((2, 4), jnp.int32)).shape
    (2, 5)
    """
    fields = {field.name for field in dataclasses.fields(model.config)}
    if "num_labels" not in fields:
        raise ConfigError(f"{type(model.config).__name__} has no num_labels to change")
    config = dataclasses.replace(model.config, num_labels=num_labels, **changes)
    model = model.clone(config=config)
    wanted = flatten(registry.abstract(model))
    old = flatten(params, is_leaf=is_leaf)
    # Only the head is made: under jit the initial values of the body are dead code.
    heads = jax.jit(lambda key: _heads(flatten(registry.init(model, key))))
    out = heads(key) if num_labels else {}
    for path, leaf in wanted.items():
        if path in out:
            continue
        if path not in old or old[path].shape != leaf.shape:
            raise StructureError(f"the new configuration needs {path} {leaf.shape}, not there")
        out[path] = old[path]
    return model, unflatten({path: out[path] for path in wanted})


def _heads(flat: dict[str, Any]) -> dict[str, Any]:
    heads = ("classifier", "head")
    return {path: leaf for path, leaf in flat.items() if path.split("/")[0] in heads}
