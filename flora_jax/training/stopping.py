"""When a run stops before its last step: no improvement, or SIGTERM."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterable
from typing import Any

from flora_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop after ``patience`` evaluations in a row without an improvement of ``min_delta``.

    Args:
      metric: ``<eval name>/<metric>``.
      mode: ``min`` or ``max``.
    """

    metric: str = "eval/loss"
    patience: int = 3
    mode: str = "min"
    min_delta: float = 0.0

    def __post_init__(self):
        if self.mode not in ("min", "max") or self.patience < 1:
            raise ConfigError(f"EarlyStopping: mode={self.mode!r}, patience={self.patience}")

    def exhausted(self, values: Iterable[float]) -> bool:
        """Whether the evaluations so far end in ``patience`` failures.

        >>> [EarlyStopping(patience=2).exhausted(v) for v in ([3, 2, 2], [3, 2, 2, 2.5])]
        [False, True]
        """
        sign = 1.0 if self.mode == "min" else -1.0
        best, failures = float("inf"), 0
        for value in values:
            better = sign * value < best - self.min_delta
            best, failures = (sign * value, 0) if better else (best, failures + 1)
        return failures >= self.patience


class Sigterm:
    """While entered, SIGTERM raises the flag ``arrived`` instead of ending the process.

    Signals reach the main thread only; elsewhere this does nothing.
    """

    def __init__(self):
        self.arrived = False

    def __enter__(self) -> Sigterm:
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.old = signal.signal(signal.SIGTERM, self._raise)
        return self

    def _raise(self, *_: Any) -> None:
        self.arrived = True

    def __exit__(self, *exc: Any) -> None:
        if self.active:
            signal.signal(signal.SIGTERM, self.old)
