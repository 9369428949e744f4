"""Name maps: our parameter paths against the tensor names of a file format, as one table.

A rule pairs a regex on our canonical path with a template of the file's name; ``{layer}`` stands
for the index of a repeated block, so that one rule serves the scanned model (one leaf for all
layers) and the unrolled one (a leaf per layer). ``axes`` is the transposition from the file's
array to ours. An architecture is a list of rules; reading, writing and adapter formats use it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flora_jax.core.errors import ConfigError, StructureError, nearest
from flora_jax.core.paths import BLOCK_NAMES, canonical, flatten, unflatten
from flora_jax.models import registry

OUT_IN = (1, 0)
"""``[out, in]`` of a torch Linear to ``[in, out]``."""
OIHW = (2, 3, 1, 0)
"""``[O, I, H, W]`` of a torch Conv2d to ``[H, W, I, O]``."""

_INDEX = re.compile(rf"(?:^|/)(?:{'|'.join(BLOCK_NAMES)})[_/](\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our path (regex, ``re.fullmatch`` on the canonical form) to the file's name.

    In ``theirs``, ``\\1`` is the regex's first group with ``/`` turned into ``.``, and
    ``{layer}`` the block's index.

    >>> rule = Rule(r"layers/(.+)/kernel", r"model.layers.{layer}.\\1.weight", OUT_IN)
    >>> rule.name("layers/mlp/up_proj/kernel")
    'model.layers.{layer}.mlp.up_proj.weight'
    """

    ours: str
    theirs: str
    axes: tuple[int, ...] | None = None

    def name(self, path: str) -> str | None:
        """The template filled but for ``{layer}``, or ``None`` if the rule is for other paths."""
        match = re.fullmatch(self.ours, canonical(path))
        return match and match.expand(self.theirs).replace("/", ".")


class Slot(NamedTuple):
    """One leaf of ours: the file's tensors that make it up (several when ``stacked``)."""

    names: tuple[str, ...]
    stacked: bool
    axes: tuple[int, ...] | None

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor in the file, for a leaf of ours of this shape."""
        shape = tuple(shape[1:] if self.stacked else shape)
        return tuple(shape[self.axes.index(i)] for i in range(len(shape))) if self.axes else shape

    def ours(self, array: np.ndarray) -> np.ndarray:
        """A tensor of the file in our layout."""
        return array.transpose(self.axes) if self.axes else array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """A leaf of ours (one layer of it, if stacked) in the file's layout."""
        return array.transpose(np.argsort(self.axes)) if self.axes else array


@dataclasses.dataclass(frozen=True)
class NameMap:
    """How a file format names the parameters of an architecture.

    Args:
      rules: first match wins; every path of ours must meet one.
      prefix: a leading part of their names that a file may lack throughout (``model.`` when the
        body was saved without its head).
      ignore: regexes of their names that are no parameters (buffers, index tables).
      copies: their names that may be present although the model has no such leaf, each with the
        tensor it must equal (a tied head).
      legacy: ``{regex: replacement}`` for names that old files use; never written.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    legacy: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def modern(self, name: str) -> str:
        """Their current name for a name in a file."""
        for pattern, replacement in self.legacy.items():
            name = re.sub(pattern, replacement, name)
        return name

    def slot(self, path: str, shape: tuple[int, ...], most: int | None = None) -> Slot:
        """What of the file makes up our leaf.

        Args:
          most: how many tensors the file has; a forged number of layers is then an error
            instead of a list of that many names.

        Raises:
          StructureError: no rule is for this path, or more layers than tensors.
        """
        for rule in self.rules:
            name = rule.name(path)
            if name is None:
                continue
            if "{layer}" not in name:
                return Slot((name,), False, rule.axes)
            index = _INDEX.search(path)
            if index:
                return Slot((name.replace("{layer}", index[1]),), False, rule.axes)
            if most is not None and shape[0] > most:
                raise StructureError(f"{path}: {shape[0]} layers, but {most} tensors in the file")
            names = tuple(name.replace("{layer}", str(i)) for i in range(shape[0]))
            return Slot(names, True, rule.axes)
        known = ", ".join(rule.ours for rule in self.rules)
        raise StructureError(f"no name rule for {path!r}; rules: {known}")

    def slots(self, shapes: Any, most: int | None = None) -> dict[str, Slot]:
        """``{our path: slot}`` for a tree of arrays or ``ShapeDtypeStruct``."""
        leaves = flatten(shapes).items()
        return {path: self.slot(path, leaf.shape, most) for path, leaf in leaves}

    def index(self, shapes: Any) -> dict[str, tuple[str, int | None]]:
        """``{their name: (our path, layer of a stacked leaf or None)}``: the inverse table."""
        return {
            name: (path, layer if slot.stacked else None)
            for path, slot in self.slots(shapes).items()
            for layer, name in enumerate(slot.names)
        }


_MAPS: dict[str, NameMap] = {}


def register(*names: str, table: NameMap) -> NameMap:
    """Register the Hugging Face name map of architectures (class names or ``model_type``).

    Raises:
      ConfigError: a name is taken.
    """
    for name in names:
        if name in _MAPS:
            raise ConfigError(f"a name map for {name!r} is registered twice")
        _MAPS[name] = table
    return table


def name_map(config: Mapping[str, Any]) -> NameMap:
    """The registered map for a ``config.json``."""
    return registry.find(_MAPS, config, "architecture (no name map)")


def _present(table: NameMap, tensors: Mapping[str, Any]) -> dict[str, str]:
    """``{full current name: name in the file}``: puts back a prefix that the whole file lacks."""
    names = {table.modern(name): name for name in tensors}
    bare = table.prefix and not any(name.startswith(table.prefix) for name in tensors)
    return names | {table.prefix + new: old for new, old in names.items()} if bare else names


def check_names(
    table: NameMap, shapes: Any, tensors: Mapping[str, Any], where: str
) -> dict[str, str]:
    """Every tensor we need is there and nothing else; gives ``{full name: name in the file}``.

    Raises:
      StructureError: missing or extra tensors, or a copy that differs from its original.
    """
    present = _present(table, tensors)
    slots = table.slots(shapes, most=len(tensors))
    needed = [name for slot in slots.values() for name in slot.names]
    missing = [name for name in needed if name not in present]
    used = {present[name] for name in needed if name in present}
    extra = [
        name
        for name in tensors
        if name not in used and not any(re.fullmatch(p, name) for p in table.ignore)
    ]
    if missing:
        close = ", ".join(nearest(missing[0], extra)) or "nothing unused"
        raise StructureError(f"{where}: missing {_some(missing)}; nearest there: {close}")
    for name in extra:
        if name not in table.copies or table.copies[name] not in present:
            close = ", ".join(nearest(name, needed))
            raise StructureError(f"{where}: unexpected {_some(extra)}; nearest expected: {close}")
        if not np.array_equal(tensors[name], tensors[present[table.copies[name]]]):
            raise StructureError(
                f"{where}: {name} differs from {table.copies[name]}, but the config ties them"
            )
    return present


def _some(names: Iterable[str], n: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(map(repr, names[:n])) + more


def to_ours(
    table: NameMap, shapes: Any, tensors: Mapping[str, np.ndarray], *, dtype: Any = None, where: str
) -> dict[str, Any]:
    """Our parameter tree from a file's tensors, strictly.

    Args:
      shapes: our tree of ``ShapeDtypeStruct``.
      tensors: the file's tensors; read one at a time.
      dtype: cast floating tensors; ``None`` keeps the file's.
      where: the file, for messages.

    Raises:
      StructureError: missing, extra or misshaped tensors.
    """
    present = check_names(table, shapes, tensors, where)
    params = {}
    for path, leaf in flatten(shapes).items():
        slot = table.slot(path, leaf.shape)
        out = None
        for layer, name in enumerate(slot.names):
            array = tensors[present[name]]
            if array.shape != slot.their_shape(leaf.shape):
                raise StructureError(
                    f"{where}: {name} has shape {array.shape}, {path} needs "
                    f"{slot.their_shape(leaf.shape)}"
                )
            if out is None:
                floating = jax.numpy.issubdtype(array.dtype, np.floating)
                out = np.empty(leaf.shape, dtype if dtype is not None and floating else array.dtype)
            (out[layer : layer + 1] if slot.stacked else out[None])[...] = slot.ours(array)
        params[path] = jax.numpy.asarray(out)
    return unflatten(params)


class Theirs(Mapping[str, np.ndarray]):
    """The tensors of our parameters under their names; each is made when asked for."""

    def __init__(self, table: NameMap, params: Any):
        self.params = flatten(params)
        self.slots = table.slots(params)
        self.where = table.index(params)

    def __getitem__(self, name: str) -> np.ndarray:
        path, layer = self.where[name]
        leaf = self.params[path]
        return self.slots[path].theirs(np.asarray(leaf if layer is None else leaf[layer]))

    def sizes(self) -> dict[str, int]:
        """Bytes per tensor."""
        return {
            name: self.params[path].nbytes // len(self.slots[path].names)
            for name, (path, _) in self.where.items()
        }

    def __iter__(self):
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)
