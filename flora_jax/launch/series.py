"""Small quantum models of a series; a reservoir's read-out may be solved at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.attention.quantum import QFWP, QRNN, QRNNReservoir
from flora_jax.core.errors import ConfigError
from flora_jax.launch.first_task import kept
from flora_jax.launch.students import RegressionSubject
from flora_jax.launch.subjects import Source
from flora_jax.models.series import SeriesModel
from flora_jax.training.losses import Regression


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallSeriesModel(Source):
    """A cell with fresh parameters, for the data ``Series``; judged by its mean squared error.

    Args:
      cell: ``QFWP``, ``StaticVQC``, ``QRNN`` or ``QRNNReservoir``.
      ridge: a reservoir's read-out starts at the solution of ridge regression on the training
        windows with this strength, which ``mse_before`` then judges; None is a random start.
      seed: of the parameters.
    """

    cell: QFWP | QRNN
    ridge: float | None = None
    seed: int = 0

    def load(self, data, folder=None):
        cell = dataclasses.replace(self.cell, features=data.features)
        if self.ridge is not None and not isinstance(cell, QRNNReservoir):
            kind = type(cell).__name__
            raise ConfigError(f"SmallSeriesModel.ridge is for a QRNNReservoir, not {kind}")
        params = kept(folder, lambda: self._start(cell, data))
        model = SeriesModel(cell)
        name = f"{type(cell).__name__} on {data.source}"
        return RegressionSubject(model, params, Regression(model=model), name)

    def _start(self, cell, data):
        params = cell.init(jax.random.key(self.seed))
        if self.ridge is None:
            return params
        x, y = map(jnp.asarray, data.arrays("train"))
        return jax.jit(lambda p, x, y: cell.fit(p, x, y, self.ridge))(params, x, y)
