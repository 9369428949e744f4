"""Next-value regression on two smooth series: a damped pendulum and a Bessel function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data import pipeline
from flora_jax.data.generated import array_evaluation
from flora_jax.data.packing import Batch

GRAVITY, DAMPING = 9.81, 0.15
SUBSTEPS = 8  # of Runge-Kutta between two points of the pendulum


def damped_pendulum() -> np.ndarray:
    """The velocity of ``a'' = -0.15 a' - 9.81 sin a`` from ``(a, a') = (0, 3)``.

    240 points on [0, 20].
    """
    dt = 20 / 239 / SUBSTEPS
    slope = lambda s: np.array([s[1], -DAMPING * s[1] - GRAVITY * np.sin(s[0])])
    state, found = np.array([0.0, 3.0]), [3.0]
    for step in range(1, 239 * SUBSTEPS + 1):
        k1 = slope(state)
        k2 = slope(state + dt / 2 * k1)
        k3 = slope(state + dt / 2 * k2)
        k4 = slope(state + dt * k3)
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if step % SUBSTEPS == 0:
            found.append(state[1])
    return np.array(found)


def bessel_j2() -> np.ndarray:
    """``J_2``, 256 points on [2, 100]: ``1/pi int_0^pi cos(2 t - x sin t) dt``."""
    x = np.linspace(2, 100, 256)[:, None]
    t = (np.arange(256) + 0.5) * np.pi / 256  # exact to rounding: the integrand is periodic
    return np.cos(2 * t - x * np.sin(t)).mean(1)


SERIES = {"damped_pendulum": damped_pendulum, "bessel_j2": bessel_j2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Windows of a series and the value that follows each; the last ones are held out.

    The series is scaled to [-1, 1] as a whole, as in the code of arXiv 2402.17760 (so the scale
    has seen the held-out part; here no value after the first third is an extreme). Batches: ``x``
    [B, window, 1], or [B, 1, window] with ``as_features``, ``y`` [B, 1], ``weight`` [B], float32.

    Example:
        >>> data = Series()
        >>> [part[0].shape for part in (data.arrays("train"), data.arrays("test"))]
        [(157, 4, 1), (78, 4, 1)]

    Attributes:
        source: ``damped_pendulum`` or ``bessel_j2``.
        window: values that a model sees.
        fraction: of the windows to train on: the first ones.
        as_features: the window is one token of ``window`` features, not a sequence.
        shuffle: train in a new order every epoch; in the series' order if not.
    """

    source: str = "damped_pendulum"
    window: int = 4
    fraction: float = 0.67
    as_features: bool = False
    shuffle: bool = False

    def __post_init__(self) -> None:
        if self.source not in SERIES:
            raise ConfigError(unknown("series", self.source, SERIES))
        if not 0 < self.fraction < 1:
            raise ConfigError(f"Series.fraction={self.fraction} is not between 0 and 1")
        # As in the published code, the last window that would fit is left out.
        windows = len(self.values) - self.window - 1
        if self.window < 1 or int(self.fraction * windows) < 1:
            raise ConfigError(f"Series.window={self.window} does not fit {len(self.values)} points")

    @property
    def values(self) -> np.ndarray:
        """The whole series in [-1, 1], float64."""
        return _scaled(self.source)

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.window if self.as_features else 1

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)`` of ``train`` or ``test``, float32."""
        values = self.values.astype(np.float32)
        x = np.lib.stride_tricks.sliding_window_view(values, self.window)[:-2]
        y = values[self.window : -1, None]
        x = x[:, None, :] if self.as_features else x[:, :, None]
        cut = int(self.fraction * len(x))
        return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}[split]

    def train(
        self,
        tokenizer: Any = None,
        batch_size: int = 10,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Endless batches of the training windows."""
        rows = self._rows("train")
        windows = grain.MapDataset.range(len(rows["y"])).map(
            lambda i: {name: value[int(i)] for name, value in rows.items()}
        )
        return pipeline.training_batches(
            windows, batch_size=batch_size, seed=seed, shard=shard, shuffle=self.shuffle
        )

    def evaluation(
        self,
        tokenizer: Any = None,
        batch_size: int = 128,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """The held-out windows."""
        return array_evaluation(self._rows("test"), batch_size, max_batches, shard)

    def _rows(self, split: str) -> Batch:
        x, y = self.arrays(split)
        return {"x": x, "y": y, "weight": np.ones(len(x), np.float32)}


@functools.cache
def _scaled(source: str) -> np.ndarray:
    values = SERIES[source]()
    return 2 * (values - values.min()) / (values.max() - values.min()) - 1
