"""What ``flora bench kernels`` compiles and measures: cases of every op that has a ``bench.py``.

An op takes part by a module ``kernels/<op>/bench.py`` with ``cases() -> Iterable[Case]``; its
shapes come from the op's ``arg_specs.py``, which the tests and the ahead-of-time compiles share.
A case holds abstract arguments, so listing all of them allocates nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax import kernels
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.kernels.costs import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """What the op is measured against: another function, of the case's first arguments or alike."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Args:
      name: says the shape, e.g. ``"w4a16 M=16 K=4096 N=14336"``; unique within the op.
      function: the call through the op's dispatcher.
      args: pytrees of ``jax.ShapeDtypeStruct``.
      work: of the forward pass.
      wrt: positions of the arguments whose gradients are taken; none: no backward case.
      gradient_work: of :attr:`gradient`.
      rivals: by name.
      draw: ``key -> args``; default: normal floats, codes of all values for int8 and uint8.
      small: a CPU measures it within seconds.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    work: Work
    wrt: tuple[int, ...] = ()
    gradient_work: Work | None = None
    rivals: Mapping[str, Rival] = dataclasses.field(default_factory=dict)
    draw: Callable[[jax.Array], tuple[Any, ...]] | None = None
    small: bool = False

    def gradient(self, *args: Any) -> Any:
        """Gradients of the sum of all outputs by the arguments ``wrt``.

        The forward pass is compiled in as far as the gradient needs it.
        """
        return gradient(self.function, self.wrt)(*args)

    def rival_gradient(self, rival: Rival) -> Callable[..., Any]:
        """A rival's gradients, by those of the arguments ``wrt`` that it has."""
        return gradient(rival.function, tuple(at for at in self.wrt if at < len(rival.args)))

    def inputs(self, key: jax.Array) -> tuple[Any, ...]:
        """Arguments to measure with."""
        return self.draw(key) if self.draw else draw(self.args, key)


def gradient(function: Callable[..., Any], wrt: tuple[int, ...]) -> Callable[..., Any]:
    """``function``'s gradients by the arguments at ``wrt``, every output's cotangent 1."""

    def run(*args: Any) -> Any:
        def partial(*moved: Any) -> Any:
            full = list(args)
            for position, value in zip(wrt, moved):
                full[position] = value
            return function(*full)

        out, pull = jax.vjp(partial, *(args[position] for position in wrt))
        return pull(jax.tree.map(jnp.ones_like, out))

    return run


def draw(args: Any, key: jax.Array) -> Any:
    """Arrays for abstract arguments: floats N(0, 1), integers over their whole byte range."""
    leaves, tree = jax.tree.flatten(args)
    keys = jax.random.split(key, max(len(leaves), 1))

    def one(leaf: Any, key: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.random.normal(key, leaf.shape).astype(leaf.dtype)
        return jax.random.bits(key, leaf.shape, np.uint8).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [one(leaf, k) for leaf, k in zip(leaves, keys)])


def ops() -> list[str]:
    """The ops that have a ``bench.py``, sorted."""
    found = []
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            inner = importlib.import_module(f"flora_jax.kernels.{module.name}")
            if "bench" in {m.name for m in pkgutil.iter_modules(inner.__path__)}:
                found.append(module.name)
    return sorted(found)


def cases(op: str) -> list[Case]:
    """The cases of one op.

    Raises:
      ConfigError: unknown op, or two cases of one name.
    """
    if op not in ops():
        raise ConfigError(unknown("kernel op", op, ops()))
    found: Iterable[Case] = importlib.import_module(f"flora_jax.kernels.{op}.bench").cases()
    found = list(found)
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{op}: two cases named {twice[0]!r}")
    return found
