"""Gin on a leash: the one place where gin-config meets the library.

A configuration is an object graph. ``register`` lets gin build a frozen dataclass or call a
factory; ``entry_point`` lets gin collect the arguments of a function such as ``train``. Gin runs
once, before any tracing: :func:`load` parses files and bindings, :meth:`Config.arguments` builds
the graph, and gin is out of the way when the function itself is called. What gin 0.5 accepts
silently is an error here: a value of the wrong type, a binding that nothing uses, an undefined
macro, a reference that is not called.

    >>> import dataclasses
    >>> @register
    ... @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Knob:
    ...     size: int = 1
    >>> load(bindings=["Knob.size=3"]).build("Knob")
    Knob(size=3)
    >>> Knob()
    Knob(size=1)
    >>> clear()
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import gin
from gin import config_parser

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.launch import bindings as _parsed
from flora_jax.launch.bindings import MACRO, clear, find_file
from flora_jax.launch.typecheck import conform, hints

__all__ = ["Config", "clear", "entry_point", "find_file", "known", "load", "register"]

T = TypeVar("T")


def register(thing: T | None = None, *, name: str | None = None) -> Any:
    """Lets gin build a frozen dataclass or call a factory, as ``@Name()``; returns it unchanged.

    Values that gin supplies are checked against the type hints.

    Args:
      thing: the class or function.
      name: the name in gin files; the thing's own by default.

    Raises:
      ConfigError: another thing has that name.
    """
    if thing is None:
        return lambda decorated: register(decorated, name=name)
    _register(thing, name or thing.__name__, lambda kwargs: thing(**kwargs), False)
    return thing


def entry_point(function: T) -> T:
    """Lets gin collect the keyword arguments of ``function``; returns it unchanged."""
    _register(function, function.__name__, lambda kwargs: kwargs, True)
    return function


def _register(thing: Any, name: str, finish: Callable[[dict], Any], is_entry_point: bool) -> None:
    already = _parsed.registered.get(name)
    if already is not None:
        if already.thing is thing:
            return
        raise ConfigError(f"two things are registered as {name!r}: {already.thing} and {thing}")
    signature = inspect.signature(thing)
    types = hints(thing)

    def build(**kwargs: Any) -> Any:
        scope = gin.current_scope_str()
        for key, parameter in signature.parameters.items():
            if parameter.default is parameter.empty and key not in kwargs:
                raise ConfigError(f"{name}.{key} is required: add --gin.{name}.{key}=VALUE")
        checked = {
            key: conform(value, types.get(key, Any), _place(scope, name, key))
            for key, value in kwargs.items()
        }
        return finish(checked)

    build.__signature__ = signature
    build.__name__ = build.__qualname__ = name
    build.__doc__ = thing.__doc__
    decorate = gin.configurable if is_entry_point else gin.register
    with gin.unlock_config():
        decorate(name, module="flora_jax")(build)
    parameters = tuple(signature.parameters)
    _parsed.registered[name] = _parsed.Entry(name, thing, parameters, is_entry_point)


def _place(scope: str, name: str, key: str) -> str:
    """``file.gin:3: LoRA.rank``, the place of the binding that gives a field its value."""
    parts = scope.split("/") if scope else []
    for depth in range(len(parts), -1, -1):
        binding = _parsed.bindings.get(("/".join(parts[:depth]), name, key))
        if binding is not None:
            place = "" if binding.from_command_line else f"{binding.where}: "
            return f"{place}{name}.{key}"
    return f"{name}.{key}"


def known() -> dict[str, tuple[str, ...]]:
    """Every name gin may use, with its parameters."""
    return {name: entry.parameters for name, entry in sorted(_parsed.registered.items())}


@dataclasses.dataclass(frozen=True)
class Config:
    """A parsed configuration; gin builds from the one loaded last.

    Attributes:
      text: the statements as given, includes written out; parsing it gives this config again.
      sources: the files read, in order.
    """

    text: str
    sources: tuple[str, ...]

    def canonical(self, exclude: Iterable[str] = ()) -> str:
        """One line per effective binding, sorted: what :meth:`hash` is taken of."""
        exclude = set(exclude)
        lines = {_parsed.shown(key): binding.value for key, binding in _parsed.bindings.items()}
        return "\n".join(f"{left} = {lines[left]!r}" for left in sorted(lines.keys() - exclude))

    def hash(self, exclude: Iterable[str] = ()) -> str:
        """Twelve hex digits, equal for two configurations with the same bindings.

        Args:
          exclude: bindings that do not tell runs apart, e.g. ``train.out``.
        """
        return hashlib.sha256(self.canonical(exclude).encode()).hexdigest()[:12]

    def operative(self) -> str:
        """The values, bound and default, that the last build used, as a gin file."""
        return gin.operative_config_str(max_line_length=100)

    def arguments(self, entry: str, **overrides: Any) -> dict[str, Any]:
        """The keyword arguments of an entry point, built and checked; every binding was used.

        Raises:
          ConfigError: a wrong type, a missing argument, or a binding that nothing used.
        """
        kwargs = self.build(entry, **overrides)
        _check_used(entry)
        return kwargs

    def build(self, name: str, **overrides: Any) -> Any:
        """The object gin makes of ``@name()``."""
        if name not in _parsed.registered:
            raise ConfigError(unknown("name", name, _parsed.registered))
        try:
            return gin.get_configurable(f"flora_jax.{name}")(**overrides)
        except Exception as error:
            _raise_plain(error)


def _raise_plain(error: Exception) -> NoReturn:
    """Raises what went wrong without the lines that gin appends to a message."""
    text = str(error).split("\n  In call to configurable")[0].split("\n  No values supplied")[0]
    if isinstance(error, (ValueError, TypeError, RuntimeError)):
        raise ConfigError(text) from None
    raise error


def _check_used(entry: str) -> None:
    """Raises for the first binding that nothing read; gin leaves it out in silence.

    Bindings of other entry points belong to other commands. A file's bindings of something that a
    later binding replaced (``adapter = @LoRA()``, then ``--gin.adapter=@FLoRA()``) are left over
    and harmless.
    """
    used = _operative_keys()
    displaced = _displaced()
    for key, binding in _parsed.bindings.items():
        scope, name, _ = key
        if _is_used(scope, name, used):
            continue
        known_entry = _parsed.registered.get(name)
        if known_entry is not None and known_entry.is_entry_point and name != entry:
            continue
        label = f"{MACRO}{scope}" if name == MACRO else name
        if label in displaced and not binding.from_command_line:
            continue
        names = ", ".join(sorted({n for _, n in used if n != MACRO}))
        raise ConfigError(f"{binding.where}: nothing uses {_parsed.shown(key)}; used are {names}")


def _operative_keys() -> set[tuple[str, str]]:
    """``(scope, name)`` of everything that was called since the last parse, macros included."""
    text = gin.operative_config_str()
    found = set()
    for statement in config_parser.ConfigParser(text, _parsed.PlainDelegate()):
        if not statement.arg_name:
            scope = f"{statement.scope}/" if statement.scope else ""
            found.add((scope + statement.selector, MACRO))
    for line in re.findall(r"^# Parameters for (.*):$", text, re.MULTILINE):
        scope, _, name = line.rpartition("/")
        found.add((scope, name))
    return found


def _is_used(scope: str, name: str, used: set[tuple[str, str]]) -> bool:
    if name == MACRO:
        return (scope, MACRO) in used
    return any(n == name and f"{s}/".startswith(f"{scope}/" if scope else "") for s, n in used)


def _displaced() -> set[str]:
    """Names reachable through references that later bindings replaced."""
    seen: set[str] = set()
    frontier = set(_parsed.superseded)
    while frontier:
        seen |= frontier
        frontier = {
            reference
            for (scope, name, _), binding in _parsed.bindings.items()
            if (f"{MACRO}{scope}" if name == MACRO else name) in frontier
            for reference in _parsed.references(binding.value)
        } - seen
    return seen


def load(
    files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
) -> Config:
    """Parses gin files, then bindings; later ones win. Clears what was loaded before.

    Args:
      files: gin files, found by :func:`find_file`.
      bindings: ``NAME=VALUE`` texts; an unquoted word or path is a string.
      search_paths: folders tried before the shipped ``configs``.

    Raises:
      ConfigError: a syntax error, an unknown name, an undefined macro.
    """
    clear()
    sources: list[str] = []
    open_files: list[Path] = []

    def read(name: str, beside: Path | None = None) -> str:
        path = find_file(name, search_paths, beside).resolve()
        if path in open_files:
            raise ConfigError(f"{name} includes itself")
        sources.append(str(path))
        open_files.append(path)
        text = _parsed.parse_file(path, name, lambda included: read(included, path.parent))
        open_files.pop()
        return text if text.endswith("\n") else text + "\n"

    text = "".join(read(str(file)) for file in files)
    text += "".join(map(_parsed.parse_binding, bindings))
    _check_macros()
    gin.finalize()
    return Config(text=text, sources=tuple(sources))


def _check_macros() -> None:
    defined = _parsed.macros()
    for binding in _parsed.bindings.values():
        for reference in _parsed.references(binding.value):
            if reference.startswith(MACRO) and reference[1:] not in defined:
                text = unknown("macro", reference, (f"{MACRO}{m}" for m in defined))
                raise ConfigError(f"{binding.where}: {text}")
