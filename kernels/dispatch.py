"""One dispatcher for every kernel: which implementation of an op runs, and why.

An op is a table ``{implementation: function}``. Without a choice the platform decides: TPU runs
``pallas_tpu``, all else ``xla``; an implementation that raises ``NotImplementedError`` gives way to
the next. ``mosaic_gpu``, for GPUs of compute capability 9.0 or newer, has run on no device yet and
is only taken by choice (:data:`UNTRIED`). A choice is an argument
(``implementation=``), a context (``with use("xla"):``) or the environment variable
``FLORA_KERNELS``, in this order; it is final: what cannot run raises and says why.

An op may also name implementations that give way where they expect to be slower (``yields`` of
:func:`run`).

The choice is read while tracing: a compiled function keeps the one it was traced with.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flora_jax.core.errors import ConfigError, unknown

LOG = logging.getLogger("flora_jax.kernels")
VARIABLE = "FLORA_KERNELS"
IMPLEMENTATIONS = ("mosaic_gpu", "pallas_tpu", "xla", "reference")
ORDER = {
    "tpu": ("pallas_tpu", "xla", "reference"),
    "sm90": ("mosaic_gpu", "xla", "reference"),
    "other": ("xla", "reference"),
}
"""What is there, best first, on a TPU, on a Hopper or newer GPU, and elsewhere."""
UNTRIED = ("mosaic_gpu",)
"""Compiled, but run on no device yet: no platform takes these by itself."""
NEEDS = {"pallas_tpu": "tpu", "mosaic_gpu": "sm90"}

Choice = str | Sequence[str] | None

_choice: contextvars.ContextVar[Choice] = contextvars.ContextVar("choice", default=None)
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=False)
_logged: set[tuple[str, str]] = set()


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def use(implementation: Choice) -> contextlib.AbstractContextManager[None]:
    """Every op traced inside runs this implementation, or the first of these that can.

    >>> with use("xla"):
    ...     chosen(None)
    ('xla',)

    Raises:
      ConfigError: unknown implementation.
    """
    _names(implementation)
    return _set(_choice, implementation)


def target(platform: str) -> contextlib.AbstractContextManager[None]:
    """Ops traced inside are compiled for ``tpu``, ``sm90`` or ``other``, not for this machine."""
    if platform not in ORDER:
        raise ConfigError(unknown("kernel target", platform, ORDER))
    return _set(_target, platform)


def interpret(mode: Any = True) -> contextlib.AbstractContextManager[None]:
    """Pallas kernels traced inside are interpreted, on any platform.

    Args:
      mode: ``True``, ``pltpu.InterpretParams(...)`` (simulated TPU memory, race detection), or the
        interpreter parameters of Mosaic GPU.
    """
    return _set(_interpret, mode)


def interpret_mode() -> Any:
    """What a kernel passes as ``interpret=``."""
    return _interpret.get()


def platform() -> str:
    """``tpu``, ``sm90`` or ``other``: the target of a compile, else this machine's."""
    if _target.get() is not None:
        return _target.get()
    backend = jax.default_backend()
    if backend == "tpu":
        return "tpu"
    if backend == "gpu":
        capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
        return "sm90" if float(capability) >= 9.0 else "other"
    return "other"


def _names(choice: Choice) -> tuple[str, ...] | None:
    if choice is None:
        return None
    names = (choice,) if isinstance(choice, str) else tuple(choice)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ConfigError(unknown("kernel implementation", name, IMPLEMENTATIONS))
    if not names:
        raise ConfigError("an empty list of kernel implementations")
    return names


def chosen(implementation: Choice) -> tuple[str, ...] | None:
    """The argument, else the context, else ``FLORA_KERNELS`` (comma separated), else None.

    Raises:
      ConfigError: unknown implementation.
    """
    variable = os.environ.get(VARIABLE, "").split(",") if os.environ.get(VARIABLE) else None
    for choice in (implementation, _choice.get(), variable):
        if choice is not None:
            return _names(choice)
    return None


def _refusal(name: str) -> str | None:
    """Why an implementation cannot run here, or None."""
    needs = NEEDS.get(name)
    if needs is None or platform() == needs or interpret_mode():
        return None
    what = {"tpu": "a TPU", "sm90": "a GPU of compute capability 9.0 or newer"}[needs]
    return f"needs {what}; this is {jax.default_backend()}"


def untried() -> contextlib.AbstractContextManager[None]:
    """Untried implementations come first inside, where the platform has one and none is chosen.

    >>> with target("sm90"), untried():
    ...     chosen(None)
    ('mosaic_gpu', 'xla', 'reference')
    """
    order = ORDER[platform()]
    if chosen(None) is None and any(name in UNTRIED for name in order):
        return use(order)
    return contextlib.nullcontext()


def run(
    op: str,
    table: Mapping[str, Callable[..., Any]],
    *args: Any,
    implementation: Choice = None,
    yields: Mapping[str, Callable[..., str | None]] | None = None,
    **kwargs: Any,
) -> Any:
    """Calls the first implementation of an op that can run.

    Args:
      op: the op's name, for messages and the log.
      table: ``{implementation: function}``; a function raises ``NotImplementedError`` with the
        reason when it cannot take its arguments, before it computes anything.
      implementation: one name or several in order; final. Default: by platform.
      yields: ``{implementation: function}`` of the same arguments, which says why those that
        follow are expected to be faster, or None; not asked where none follows.

    Raises:
      NotImplementedError: no implementation that may run can; says why of each.
      ConfigError: unknown implementation.

    >>> run("double", {"xla": lambda x: 2 * x}, 4)
    8
    """
    names = chosen(implementation)
    names = names or tuple(name for name in ORDER[platform()] if name not in UNTRIED)
    reasons, queue, asked = [], list(names), set()
    for name in queue:
        reason = "the op has none" if name not in table else _refusal(name)
        if reason is None:
            try:
                if name in (yields or {}) and name not in asked and name != queue[-1]:
                    asked.add(name)
                    reason = yields[name](*args, **kwargs)
                    if reason is not None:
                        # If no other can.
                        queue.append(name)
                        raise NotImplementedError(reason)
                result = table[name](*args, **kwargs)
            except NotImplementedError as error:
                reason = str(error)
            else:
                log(op, name, reasons)
                return result
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: {'; '.join(reasons)}")


def log(op: str, name: str, passed_over: Sequence[str] = ()) -> None:
    """Once for each op and name: what runs, and why not what comes before it."""
    if (op, name) not in _logged:
        _logged.add((op, name))
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        LOG.info("%s runs as %s%s", op, name, why)
