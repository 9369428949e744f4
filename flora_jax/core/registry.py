"""One registry of methods: family, name, class, paper, arXiv id.

>>> @register("Nothing", family="example", paper="none", arxiv="")
... class Nothing: pass
>>> lookup("example", "Nothing") is Nothing
True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from flora_jax.core.errors import ConfigError, unknown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row of ``flora methods``.

    Args:
      parameters: the formula of the trainable count, in the sizes of the kernel.
      mergeable: whether it folds into a plain kernel exactly.
      peft: the HF-PEFT type its files map to, or "".
    """

    name: str
    family: str
    cls: type
    paper: str
    arxiv: str
    parameters: str = ""
    mergeable: bool = True
    peft: str = ""


_METHODS: dict[tuple[str, str], Method] = {}


def register(name: str, *, family: str, paper: str, arxiv: str, **info: Any) -> Callable[[T], T]:
    """Class decorator that adds a method to the table.

    Raises:
      ConfigError: the name is taken.
    """

    def add(cls: T) -> T:
        known = _METHODS.get((family, name))
        if known is not None and known.cls.__qualname__ != cls.__qualname__:
            raise ConfigError(f"{family} method {name!r} is registered twice")
        _METHODS[family, name] = Method(
            name=name, family=family, cls=cls, paper=paper, arxiv=arxiv, **info
        )
        return cls

    return add


def lookup(family: str | tuple[str, ...], name: str) -> type:
    """The class registered under a name; of several families the first that has it.

    Raises:
      ConfigError: unknown name; says the nearest.
    """
    families = (family,) if isinstance(family, str) else family
    for one in families:
        if (one, name) in _METHODS:
            return _METHODS[one, name].cls
    known = [n for f, n in _METHODS if f in families]
    raise ConfigError(unknown(f"{families[0]} method", name, known))


def methods(family: str | None = None) -> list[Method]:
    """Every method registered so far, by family and name: optimizers join with their module."""
    rows = sorted(_METHODS.values(), key=lambda m: (m.family, m.name.lower()))
    return [m for m in rows if family in (None, m.family)]


def method_of(value: Any) -> Method:
    """The row of an instance's class.

    Raises:
      ConfigError: the class is not registered.
    """
    for method in _METHODS.values():
        if method.cls is type(value):
            return method
    raise ConfigError(f"{type(value).__name__} is not a registered method")


def name_of(value: Any) -> str:
    """The registered name of an instance's class."""
    return method_of(value).name
