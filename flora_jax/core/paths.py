"""Slash paths and the one rule language: an ordered list of ``(regex, thing)``, first match wins.

A path is the keys of a nested dict joined by ``/``. A rule is tried with ``re.fullmatch`` on the
path itself and on its canonical form, in which a repeated block has no index: ``layers_3/attn/q``
(unrolled) and ``layers/attn/q`` (scanned) have the same canonical path ``layers/attn/q``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from flora_jax.core.errors import RuleError, StructureError, nearest

T = TypeVar("T")
BLOCK_NAMES = ("layers", "layer", "blocks", "block", "h")
_INDEXED = re.compile(rf"(?:^|(?<=/))({'|'.join(BLOCK_NAMES)})(?:_|/)\d+(?=/|$)")


def canonical(path: str) -> str:
    """The path without the index of a repeated block.

    >>> canonical("model/layers_11/attn/q_proj/kernel")
    'model/layers/attn/q_proj/kernel'
    >>> canonical("h/3/mlp/kernel"), canonical("Dense_0/kernel")
    ('h/mlp/kernel', 'Dense_0/kernel')
    """
    return _INDEXED.sub(r"\1", path)


def block_indices(path: str) -> tuple[int, ...]:
    """The indices that :func:`canonical` drops, outermost first.

    >>> block_indices("layers_3/mlp/layers/2/kernel"), block_indices("Dense_1/kernel")
    ((3, 2), ())
    """
    return tuple(int(re.split("_|/", m.group())[-1]) for m in _INDEXED.finditer(path))


def _key(entry: Any) -> str:
    """The text of one key of a jax key path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """``{path: leaf}`` of a nested tree, in tree order.

    >>> flatten({"a": {"kernel": 1, "bias": 2}})
    {'a/bias': 2, 'a/kernel': 1}
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(map(_key, path)): leaf for path, leaf in pairs}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from ``{path: leaf}``; the inverse of :func:`flatten` on nested dicts.

    Raises:
      StructureError: one path is a prefix of another.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise StructureError(f"path {path!r} runs through a leaf at {parent!r}")
        if name in node:
            raise StructureError(f"path {path!r} is a leaf and a parent at once, or given twice")
        node[name] = leaf
    return tree


def map_with_path(
    f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """``jax.tree.map`` whose function gets the slash path first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f("/".join(map(_key, path)), *leaves), tree, *rest, is_leaf=is_leaf
    )


@dataclasses.dataclass(frozen=True)
class Rules(Generic[T]):
    """An ordered list of ``(regex, thing)``; the first rule that matches a path gives its thing.

    >>> rules = Rules.of({r".*/q_proj/kernel": 1, r".*/kernel": 2})
    >>> rules.match(["layers_0/q_proj/kernel", "layers_0/mlp/kernel", "norm/scale"])
    {'layers_0/q_proj/kernel': 1, 'layers_0/mlp/kernel': 2}
    """

    items: tuple[tuple[str, T], ...]

    @classmethod
    def of(cls, rules: Mapping[str, T] | Sequence[tuple[str, T]] | Rules[T]) -> Rules[T]:
        """Rules from a dict (in its order) or a sequence of pairs; checks every regex.

        Raises:
          RuleError: a regex does not compile.
        """
        if isinstance(rules, Rules):
            return rules
        pairs = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(map(tuple, rules))
        for pattern, _ in pairs:
            try:
                re.compile(pattern)
            except re.error as error:
                raise RuleError(f"rule {pattern!r} is not a regular expression: {error}") from None
        return cls(pairs)

    def find(self, path: str) -> int | None:
        """The index of the first rule that matches the path or its canonical form."""
        short = canonical(path)
        for index, (pattern, _) in enumerate(self.items):
            if re.fullmatch(pattern, path) or re.fullmatch(pattern, short):
                return index
        return None

    def match(self, paths: Iterable[str], *, strict: bool = True) -> dict[str, T]:
        """``{path: thing}`` for every path that a rule matches.

        Args:
          paths: the paths to try, all of them.
          strict: a rule that no path reaches is an error.

        Raises:
          RuleError: a rule matches nothing, or only paths that earlier rules took.
        """
        paths = list(paths)
        hits = {path: self.find(path) for path in paths}
        if strict:
            used = set(hits.values())
            for index, (pattern, _) in enumerate(self.items):
                if index not in used:
                    raise RuleError(self._unused(pattern, paths, hits))
        return {path: self.items[index][1] for path, index in hits.items() if index is not None}

    def _unused(self, pattern: str, paths: list[str], hits: Mapping[str, int | None]) -> str:
        taken = [
            p for p in paths if re.fullmatch(pattern, p) or re.fullmatch(pattern, canonical(p))
        ]
        if taken:
            first = self.items[hits[taken[0]]][0]
            return f"rule {pattern!r} is never reached: {first!r} comes first for {taken[0]!r}"
        literal = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
        return (
            f"rule {pattern!r} matches nothing; nearest paths: {', '.join(nearest(literal, paths))}"
        )
