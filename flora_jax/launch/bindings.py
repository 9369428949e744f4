"""Reads gin files and command-line bindings: every one keeps its place; unknown names are errors.

Gin's own parser and binder do the work. This module adds what gin 0.5 lacks: the file and line of
each binding, the nearest names for a misspelt one, strings without quotes on a command line, and
the record of replaced references that the check for unused bindings needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from flora_jax.core.errors import ConfigError, FloraError, unknown

Key = tuple[str, str, str]  # scope, configurable, argument; a macro x is ("x", "%", "value")
MACRO = "%"
_BARE = re.compile(r"[^\s'\"@%\[\](){}][^'\"\n]*")  # an unquoted word or path


@dataclasses.dataclass(frozen=True)
class Entry:
    """What gin may build: its name, its function or class, and whether it is an entry point."""

    name: str
    thing: Callable[..., Any]
    parameters: tuple[str, ...]
    is_entry_point: bool


@dataclasses.dataclass(frozen=True)
class Binding:
    """A value and the place it was written: ``file.gin:3`` or ``--gin.LoRA.rank=8``."""

    value: Any
    where: str
    from_command_line: bool


# Gin's configuration is one per process, so what is known about it is too.
registered: dict[str, Entry] = {}
bindings: dict[Key, Binding] = {}
superseded: set[str] = set()  # names whose reference a later binding replaced


def clear() -> None:
    """Forgets every binding (not what is registered)."""
    gin.clear_config()
    bindings.clear()
    superseded.clear()


class _Delegate(config_parser.ParserDelegate):
    """Resolves ``@Name()`` and ``%macro`` while parsing, with nearest names for unknown ones."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        name = scoped_selector.rsplit("/", 1)[-1]
        if name not in registered:
            raise ConfigError(unknown("name", f"@{name}", (f"@{n}" for n in registered)))
        if not evaluate:
            raise ConfigError(f"@{scoped_selector} is not called: write @{scoped_selector}()")
        return gin_config.ConfigurableReference(scoped_selector, evaluate)

    def macro(self, name: str) -> Any:
        return gin_config.ParserDelegate().macro(name)


class PlainDelegate(config_parser.ParserDelegate):
    """Keeps references as text: for reading what gin prints."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        return f"@{scoped_selector}"

    def macro(self, name: str) -> Any:
        return MACRO + name


def references(value: Any) -> set[str]:
    """Names that a parsed value refers to: ``LoRA`` for ``@LoRA()``, ``%x`` for a macro."""
    found = set()
    for reference in gin_config.iterate_references({"": value}):
        is_macro = reference.selector == "gin.macro"
        found.add(MACRO + "/".join(reference.scopes) if is_macro else reference.selector)
    return found


def macros() -> set[str]:
    """The macros that are defined."""
    return {scope for scope, name, _ in bindings if name == MACRO}


def shown(key: Key) -> str:
    """The left side of a binding as one writes it."""
    scope, name, argument = key
    return scope if name == MACRO else f"{scope + '/' if scope else ''}{name}.{argument}"


def _check_key(key: Key) -> None:
    _, name, argument = key
    if name not in registered:
        raise ConfigError(unknown("name", name, registered))
    if argument not in registered[name].parameters:
        raise ConfigError(unknown(f"parameter of {name}", argument, registered[name].parameters))


def _bind(statement: Any, where: str, from_command_line: bool) -> None:
    scope, name, argument, value, _ = statement
    if argument:
        key: Key = (scope, name, argument)
        _check_key(key)
        gin.bind_parameter(key, value)
    else:
        macro = f"{scope}/{name}" if scope else name
        key = (macro, MACRO, "value")
        if from_command_line and macro not in macros():
            raise ConfigError(unknown("macro", macro, macros()))
        gin.bind_parameter((macro, "gin.macro", "value"), value)
    if key in bindings:
        superseded.update(references(bindings[key].value))
    bindings[key] = Binding(value, where, from_command_line)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the place in front of what is wrong there, on one line."""
    try:
        yield
    except _Located:
        raise
    except FloraError as error:
        raise _Located(f"{where}: {str(error).splitlines()[0]}") from None
    except (SyntaxError, tokenize.TokenError) as error:
        problem = str(error.args[0]).splitlines()[0]
        raise _Located(f"{where}: {problem}") from None


class _Located(ConfigError):
    """An error whose message already names its place."""


def parse_file(path: Path, name: str, include: Callable[[str], str]) -> str:
    """Binds every statement of a gin file in order; returns its text with includes written out.

    Args:
      path: the file.
      name: how messages call it.
      include: parses the file of an include line and returns its text.
    """
    text = path.read_text(encoding="utf-8")
    included: list[str] = []
    with _located(name):
        parser = config_parser.ConfigParser(text, _Delegate())
    while True:
        with _located(f"{name}:{parser.current_token.start[0]}"):
            statement = parser.parse_statement()
        if statement is None:
            break
        where = f"{name}:{statement.location.line_num}"
        with _located(where):
            if isinstance(statement, config_parser.BindingStatement):
                _bind(statement, where, False)
            elif isinstance(statement, config_parser.IncludeStatement):
                included.append(include(statement.filename))
            elif isinstance(statement, config_parser.ImportStatement):
                raise ConfigError("a configuration imports nothing: names are registered in Python")
    parts = iter(included)
    return re.sub(r"^include\s.*\n?", lambda _: next(parts), text, flags=re.MULTILINE)


def parse_binding(text: str) -> str:
    """Binds ``NAME=VALUE`` of a command line; returns it as a line of a gin file."""
    name, equals, value = map(str.strip, text.partition("="))
    if not equals or not name:
        raise ConfigError(f"--gin.{text}: a binding is written --gin.NAME=VALUE")
    where = f"--gin.{name}={value}"
    # Parentheses are special to shells: @LoRA stands for @LoRA() on a command line.
    value = f"{value}()" if re.fullmatch(r"@[\w/]+", value) else value
    line = f"{name} = {value}\n"
    with _located(where):
        try:
            statement = _statement(line)
        except (SyntaxError, tokenize.TokenError):
            if not _BARE.fullmatch(value):
                raise
            line = f"{name} = {value!r}\n"
            statement = _statement(line)
        if not isinstance(statement, config_parser.BindingStatement):
            raise ConfigError("a binding is written --gin.NAME=VALUE")
        _bind(statement, where, True)
    return line


def _statement(line: str) -> Any:
    return config_parser.ConfigParser(line, _Delegate()).parse_statement()


def default_search_paths() -> tuple[Path, ...]:
    """Where gin files are looked for after the paths given: the shipped ``configs`` folder."""
    package = Path(__file__).resolve().parent.parent
    roots = (package, package.parent)  # installed, and a source checkout
    return tuple(p for root in roots for p in (root / "configs", root) if p.is_dir())


def find_file(
    name: str, search_paths: Iterable[str | Path] = (), beside: Path | None = None
) -> Path:
    """The gin file of that name: as given, beside the including file, or in the search paths.

    Raises:
      ConfigError: no such file; names the nearest ones of the shipped folder.
    """
    folders = [Path(), *([beside] if beside else []), *map(Path, search_paths)]
    for folder in (*folders, *default_search_paths()):
        if (folder / name).is_file():
            return folder / name
    shipped = {
        path.relative_to(folder).as_posix()
        for folder in default_search_paths()
        if folder.name == "configs"
        for path in folder.rglob("*.gin")
    }
    raise ConfigError(unknown("gin file", name, shipped))
