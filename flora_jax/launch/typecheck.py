"""Checks a configured value against the type hint of the field that receives it."""

from __future__ import annotations

import collections.abc
import numbers
import types
import typing
from typing import Any

from flora_jax.core.errors import ConfigError

_SCALARS = {float: numbers.Real, int: numbers.Integral}


def hints(thing: Any) -> dict[str, Any]:
    """The resolved type hints of a dataclass or function; ``{}`` where one does not resolve."""
    target = thing.__init__ if isinstance(thing, type) else thing
    try:
        own = typing.get_type_hints(thing)
        return {**typing.get_type_hints(target), **own} if isinstance(thing, type) else own
    except (NameError, TypeError):
        return {}


def describe(hint: Any) -> str:
    """A type hint as a reader writes it.

    >>> describe(dict[str, int | None]), describe(tuple[int, ...] | None)
    ('dict[str, int or None]', 'tuple[int, ...] or None')
    """
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if isinstance(origin, type) and origin is not collections.abc.Callable:
        return f"{origin.__name__}[{', '.join(map(describe, args))}]"
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def conform(value: Any, hint: Any, where: str) -> Any:
    """``value`` if it fits ``hint``; lists become tuples and integers floats where asked for.

    A hint that cannot be checked (a type variable, a protocol) accepts everything.

    >>> conform([4, 8], tuple[int, ...], "LoRA.ranks")
    (4, 8)

    Raises:
      ConfigError: the value does not fit; the message names ``where``, the value and the type.
    """
    fits, result = _fit(value, hint)
    if fits:
        return result
    inner, wanted = _culprit(value, hint)
    kind = "None" if value is None else type(value).__name__
    if inner is not value:
        kind += f" with {inner!r}"
    if isinstance(inner, str) and not _accepts_text(wanted):
        kind += _text_help(inner)
    raise ConfigError(f"{where} = {value!r}: expected {describe(hint)}, got {kind}")


def _culprit(value: Any, hint: Any) -> tuple[Any, Any]:
    """The innermost value that does not fit, and the hint that it breaks."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, collections.abc.Mapping) and len(args) == 2 and origin is not tuple:
        parts = [(v, args[1]) for v in value.values()]
    elif (
        isinstance(value, (list, tuple)) and args and origin not in (typing.Union, types.UnionType)
    ):
        inner = (args[0],) * len(value) if Ellipsis in args or len(args) == 1 else args
        parts = list(zip(value, inner))
    bad = next((part for part in parts if not _fit(*part)[0]), None)
    return (value, hint) if bad is None else _culprit(*bad)


def _text_help(value: str) -> str:
    if value.lower() in ("true", "false", "none"):
        return f"; Python spells it {value.capitalize()}"
    if value.isidentifier() and value[:1].isupper():
        return f"; an object is written @{value}()"
    return ""


def _accepts_text(hint: Any) -> bool:
    return hint is str or str in typing.get_args(hint)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits ``hint``, and the value to use."""
    if hint is Any or isinstance(hint, (typing.TypeVar, str)):
        return True, value
    if hint is None or hint is type(None):
        return value is None, value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fit(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return next((r for r in (_fit(value, arg) for arg in args) if r[0]), (False, value))
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args), value
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return callable(value), value
    if hint in _SCALARS:
        good = isinstance(value, _SCALARS[hint]) and not isinstance(value, bool)
        return good, (hint(value) if good else value)
    if origin is not None:
        return _fit_container(value, origin, args)
    if isinstance(hint, type):
        if hint is tuple and isinstance(value, list):
            return True, tuple(value)
        try:
            return isinstance(value, hint), value
        except TypeError:  # a protocol that is not checkable at run time
            return True, value
    return True, value


def _fit_container(value: Any, origin: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Containers, element by element; the container keeps its type except list -> tuple."""
    if origin is tuple:
        return _fit_tuple(value, args)
    if not isinstance(origin, type):
        return True, value
    if isinstance(value, str) or not isinstance(value, origin):
        return False, value
    if issubclass(origin, collections.abc.Mapping) and len(args) == 2:
        pairs = [(_fit(k, args[0]), _fit(v, args[1])) for k, v in value.items()]
        if not all(k[0] and v[0] for k, v in pairs):
            return False, value
        return True, {k[1]: v[1] for k, v in pairs}
    if isinstance(value, (list, tuple)) and len(args) == 1:
        items = [_fit(item, args[0]) for item in value]
        return all(good for good, _ in items), type(value)(item for _, item in items)
    return True, value


def _fit_tuple(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if args == ((),):
        args = ()
    if len(args) != len(value):
        return False, value
    items = [_fit(item, arg) for item, arg in zip(value, args)]
    return all(good for good, _ in items), tuple(item for _, item in items)
