"""The torch modules of a model, as our name maps tell them; PEFT speaks of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.leaf import Weight, WeightLeaf, dense, is_leaf
from flora_jax.core.paths import flatten
from flora_jax.io.names import NameMap, Slot, name_map

KINDS = {"embedding": "embedding", "kernel": "linear"}


class Leaf(NamedTuple):
    """One torch parameter: where it lies in our tree."""

    path: str
    layer: int | None
    slot: Slot


class Module(NamedTuple):
    """A torch module with parameters of its own.

    Args:
      kind: ``linear``, ``conv``, ``embedding`` or ``other``.
      leaves: parameter name (``weight``, ``bias`` ...) to its place.
    """

    name: str
    kind: str
    leaves: dict[str, Leaf]


class Model:
    """A base model as PEFT sees it.

    Args:
      params: our parameters (arrays or weight leaves; ``ShapeDtypeStruct`` where values are not
        needed).
      names: the name map, or a module of :mod:`flora_jax.models`, or a Hugging Face config.
      bare: the names come without the map's prefix (the body was adapted without its head).
    """

    def __init__(self, params: Any, names: Any, *, bare: bool = False):
        self.params = flatten(params, is_leaf=is_leaf)
        self.table = as_name_map(names)
        shapes = {p: jax.ShapeDtypeStruct(tuple(v.shape), v.dtype) for p, v in self.params.items()}
        prefix = self.table.prefix if bare else ""
        self.modules: dict[str, Module] = {}
        for path, leaf in shapes.items():
            slot = self.table.slot(path, leaf.shape)
            for layer, full in enumerate(slot.names):
                name, _, parameter = full.removeprefix(prefix).rpartition(".")
                module = self.modules.setdefault(name, Module(name, "other", {}))
                module.leaves[parameter] = Leaf(path, layer if slot.stacked else None, slot)
                if parameter == "weight":
                    kind = _kind(path, len(slot.their_shape(leaf.shape)))
                    self.modules[name] = module._replace(kind=kind)
        self.tied = {
            original.removeprefix(prefix).rpartition(".")[0]: copy.rpartition(".")[0]
            for copy, original in self.table.copies.items()
            if copy.rpartition(".")[0] not in self.modules
        }

    def all_names(self) -> set[str]:
        """Every module's name, containers among them."""
        names = set()
        for name in self.modules:
            while name:
                names.add(name)
                name = name.rpartition(".")[0]
        return names

    def value(self, leaf: Leaf) -> np.ndarray:
        """The base value of a torch parameter, in our layout.

        Raises:
          StructureError: only its shape is known.
        """
        stored = self.params[leaf.path]
        if isinstance(stored, jax.ShapeDtypeStruct):
            raise StructureError(f"{leaf.path}: its values are needed; pass arrays, not shapes")
        return np.asarray(at_layer(stored, leaf.layer))


def at_layer(stored: Weight, layer: int | None) -> jax.Array:
    """One layer of a stored weight as a plain array."""
    if layer is not None:
        stored = jax.tree.map(lambda x: x[layer], stored)
    return dense(stored) if isinstance(stored, WeightLeaf) else stored


def _kind(path: str, rank: int) -> str:
    last = path.rpartition("/")[2]
    return "conv" if last == "kernel" and rank > 2 else KINDS.get(last, "other")


def as_name_map(names: Any) -> NameMap:
    """A name map from itself, a module with ``to_hf``, or a Hugging Face config."""
    if isinstance(names, NameMap):
        return names
    if isinstance(names, nn.Module) and hasattr(names, "to_hf"):
        return name_map(names.to_hf())
    if isinstance(names, Mapping):
        return name_map(names)
    raise StructureError(
        f"names={type(names).__name__} is not a NameMap, a model with to_hf() or a config"
    )


def dotted(name: str, end: str) -> bool:
    """PEFT's test for ``target_modules``."""
    return name == end or name.endswith(f".{end}")


def shortest(
    wanted: Collection[str],
    others: Iterable[str],
    meets: Callable[[str, str], bool] = dotted,
) -> list[str]:
    """The fewest trailing parts that name all of ``wanted`` and none of ``others``.

    Raises:
      PlanError: even a whole name is the end of another.

    >>> shortest(["m.0.q", "m.1.q"], ["m.0.k", "m.1.k", "m"])
    ['q']
    >>> shortest(["m.0.q"], ["m.1.q"])
    ['0.q']
    """
    others = set(others) - set(wanted)
    ends: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            end = ".".join(parts[-n:])
            if end in ends or not any(meets(other, end) for other in others):
                break
        else:
            taken = sorted(other for other in others if meets(other, name))
            raise PlanError(f"PEFT cannot name {name!r} without naming {taken[0]!r} as well")
        ends[end] = None
    return list(ends)
