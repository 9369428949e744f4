"""NNX models as functions of a nested dict of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from flora_jax.core import paths
from flora_jax.core.errors import StructureError
from flora_jax.core.leaf import is_leaf


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))


def params(model: nnx.Module, wrt: Any = nnx.Param) -> dict[str, Any]:
    """The parameters as nested dicts of arrays with string keys: ``layers/0/mlp/kernel``.

    Args:
      wrt: an NNX filter: which variables are parameters.

    >>> params(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))["kernel"].shape
    (3, 4)
    """
    flat = nnx.to_flat_state(nnx.state(model, wrt))
    return paths.unflatten({_path(keys): variable.get_raw_value() for keys, variable in flat})


def _filled(state: Any, bound: Mapping[str, Any]) -> Any:
    """The state with the values of ``bound`` (arrays or weight leaves) in its variables."""
    values = paths.flatten(bound, is_leaf=is_leaf)
    flat = nnx.to_flat_state(state)
    names = {_path(keys) for keys, _ in flat}
    if names != set(values):
        missing, extra = sorted(names - set(values))[:3], sorted(set(values) - names)[:3]
        raise StructureError(f"parameters and model differ: missing {missing}, extra {extra}")
    return nnx.from_flat_state(
        [(keys, variable.replace(values[_path(keys)])) for keys, variable in flat]
    )


def _call(model: nnx.Module, method: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(method):
        return lambda *args, **kwargs: method(model, *args, **kwargs)
    return getattr(model, method)


def merge(model: nnx.Module, bound: Mapping[str, Any], wrt: Any = nnx.Param) -> nnx.Module:
    """A copy of the model that holds ``bound`` parameters; the model itself is not touched.

    Raises:
      StructureError: parameters are missing or too many.
    """
    graphdef, state, rest = nnx.split(model, wrt, ...)
    return nnx.merge(graphdef, _filled(state, bound), rest, copy=True)


def apply(
    model: nnx.Module,
    bound: Mapping[str, Any],
    *args: Any,
    method: str | Callable[..., Any] = "__call__",
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> Any:
    """``model(*args, **kwargs)`` with ``bound`` parameters: the counterpart of Linen's ``apply``.

    What the call does to other variables (random streams, batch statistics, caches) is dropped:
    use :func:`functional` where it must be kept.

    Args:
      method: name of a method, or a function of ``(model, *args, **kwargs)``.

    >>> import jax
    >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> apply(model, params(model), jax.numpy.ones((2, 3))).shape
    (2, 4)
    """
    return _call(merge(model, bound, wrt), method)(*args, **kwargs)


def functional(
    model: nnx.Module, wrt: Any = nnx.Param
) -> tuple[Callable[..., tuple[Any, Any]], dict[str, Any], Any]:
    """``(f, params, rest)`` with ``f(bound, rest, *args, method=, **kw) -> (out, new rest)``.

    ``f`` is pure: use it under plain ``jax.jit``, ``jax.grad``, ``jax.vmap`` and ``shard_map``.
    ``rest`` is every other variable (random streams, batch statistics, caches), a pytree.

    >>> import jax
    >>> f, p, rest = functional(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> jax.jit(f)(p, rest, jax.numpy.ones((2, 3)))[0].shape
    (2, 4)
    """
    graphdef, template, rest = nnx.split(model, wrt, ...)

    def f(bound, rest, *args, method="__call__", **kwargs):
        whole = nnx.merge(graphdef, _filled(template, bound), rest, copy=True)
        out = _call(whole, method)(*args, **kwargs)
        return out, nnx.state(whole, nnx.Not(wrt))

    return f, params(model, wrt), rest
