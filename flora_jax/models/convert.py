"""Conversions of pretrained models: another attention, and what becomes of every leaf."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention import Variant
from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import Rules, canonical, flatten, unflatten
from flora_jax.models import registry


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did, by path of the new model (``dropped``: of the old one)."""

    copied: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.copied)} leaves copied"]
        lines += [f"renamed {old} -> {new}" for old, new in self.renamed]
        lines += [f"new     {path}" for path in self.new]
        lines += [f"dropped {path}" for path in self.dropped]
        return "\n".join(lines)


class Converted(NamedTuple):
    """A model with its parameters, and what was done."""

    model: nn.Module
    params: dict[str, Any]
    report: Report


def convert_attention(
    params: Any,
    model: nn.Module,
    rules: Mapping[str, str | None] | None = None,
    *,
    to: Variant,
    key: jax.Array | None = None,
    **changes: Any,
) -> Converted:
    """The model with another attention: leaves that fit are copied, only what is new is made.

    Args:
      params: arrays or weight leaves; copied leaves are the same objects.
      model: one of ours, whose configuration has a field ``attention``.
      rules: ``{regex of an old path: its new path or None}``: the new path may refer to groups of
        the regex (``\\\\1``); None drops the leaf, so that the new model's is made afresh. A leaf
        without a rule keeps its path. Tried on paths without the index of a repeated block.
      to: the attention variant.
      key: for the new leaves; ``jax.random.key(0)`` by default.
      changes: other fields of the configuration (``num_attention_heads=2``).

    Raises:
      ConfigError: the model has no attention to convert.
      RuleError: a rule matches nothing.
      StructureError: a leaf that a rule renames does not fit, or two leaves get one path.

    >>> from flora_jax.attention import Hedgehog
    >>> from flora_jax.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig.tiny())
    >>> params = registry.init(model, jax.random.key(0))
    >>> model, params, report = convert_attention(params, model, to=Hedgehog())
    >>> report.new
    ('layers/self_attn/attention/k_map', 'layers/self_attn/attention/q_map')
    """
    config = getattr(model, "config", None)
    if "attention" not in {f.name for f in dataclasses.fields(config)}:
        raise ConfigError(f"{type(config).__name__} has no attention to convert")
    model = model.clone(config=dataclasses.replace(config, attention=to, **changes))
    wanted = flatten(registry.abstract(model))
    moved, renamed, dropped = _moved(flatten(params, is_leaf=is_leaf), rules or {})
    out, copied = {}, []
    for path, (old, leaf) in moved.items():
        fits = path in wanted and tuple(leaf.shape) == tuple(wanted[path].shape)
        if fits:
            out[path] = leaf
            copied.append(path)
        elif old != path:
            there = wanted[path].shape if path in wanted else "not there"
            raise StructureError(f"{old} {leaf.shape} -> {path}: {there}")
        else:
            dropped.append(path)
    new = tuple(path for path in wanted if path not in out)
    key = jax.random.key(0) if key is None else key
    # Under jit the initial values of the copied leaves are dead code.
    make = jax.jit(lambda key: {path: flatten(registry.init(model, key))[path] for path in new})
    made = make(key) if new else {}
    floats = [x.dtype for x in out.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    out |= {path: x.astype(floats[0]) if floats else x for path, x in made.items()}
    report = Report(tuple(copied), tuple(renamed), new, tuple(dropped))
    return Converted(model, unflatten({path: out[path] for path in wanted}), report)


def _moved(
    flat: Mapping[str, Any], rules: Mapping[str, str | None]
) -> tuple[dict[str, tuple[str, Any]], list[tuple[str, str]], list[str]]:
    """``({new path: (old path, leaf)}, renamed, dropped)``."""
    table = Rules.of(rules)
    matches = table.match(flat) if rules else {}
    moved: dict[str, tuple[str, Any]] = {}
    renamed, dropped = [], []
    for path, leaf in flat.items():
        new = path
        if path in matches:
            if matches[path] is None:
                dropped.append(path)
                continue
            pattern = table.items[table.find(path)][0]
            subject = path if re.fullmatch(pattern, path) else canonical(path)
            new = re.fullmatch(pattern, subject).expand(matches[path])
            renamed.append((path, new))
        if new in moved:
            raise StructureError(f"{moved[new][0]} and {path} both become {new}")
        moved[new] = (path, leaf)
    return moved, renamed, dropped


def graft(base: Any, converted: Any, pretrained: Any, weight: float = 1.0) -> dict[str, Any]:
    """``base + weight (converted - pretrained)``: a conversion carried over to another fine-tune.

    In float32, cast back to the base's dtype. A leaf that the pair does not share keeps the base's
    value, also where shapes differ; a leaf that only the converted model has is copied
    (TurboDiffusion's merge, arXiv 2512.16093).
    """
    ours, new, old = (flatten(tree, is_leaf=is_leaf) for tree in (base, converted, pretrained))
    out = dict(ours)
    for path, leaf in new.items():
        if path not in ours and path not in old:
            out[path] = leaf
        elif path in ours and path in old and leaf.shape == old[path].shape == ours[path].shape:
            wide = lambda x: jnp.asarray(x, jnp.float32)
            change = wide(leaf) - wide(old[path])
            out[path] = (wide(ours[path]) + weight * change).astype(ours[path].dtype)
    return unflatten(out)
