"""Errors that name the path, the value and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FloraError(ValueError):
    """Base class of every error that flora_jax raises on bad input."""


class RuleError(FloraError):
    """A path rule is malformed, matches nothing, or two rules collide."""


class PlanError(FloraError):
    """An adapter does not fit the weight that a rule gives it."""


class StructureError(FloraError):
    """Two trees that must have the same paths, shapes or dtypes do not."""


class LazyError(FloraError, NotImplementedError):
    """An operator has no lazy rule for a kind of contraction; nothing is densified silently."""


class ConfigError(FloraError):
    """A configuration value, binding or command-line word is wrong."""


class FormatError(FloraError):
    """A file is truncated, forged, of an unknown format or not what it claims to be."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The ``n`` choices closest to ``word``, best first; falls back to the first ``n``."""
    choices = sorted(set(choices))
    return difflib.get_close_matches(word, choices, n=n, cutoff=0.3) or choices[:n]


def unknown(what: str, word: str, choices: Iterable[str]) -> str:
    """One line: the unknown word and the nearest valid choices."""
    return f"unknown {what} {word!r}; nearest: {', '.join(nearest(word, choices)) or 'none exist'}"
