"""The input statistics that a plan's methods start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from flora_jax.core.errors import FloraError
from flora_jax.core.observe import Observer, Probe, statistic_shape
from flora_jax.core.plan import Entry, Plan

Stats = dict[str, Probe]
Apply = Callable[[Any, Any], Any]
Mask = Callable[[Any], jax.Array]


def data_dependent(plan: Plan) -> tuple[Entry, ...]:
    """The entries whose start depends on the weights' inputs."""
    return tuple(entry for entry in plan if entry.adapter.statistics)


def calibrate(
    apply: Apply, params: Any, plan: Plan, batches: Iterable[Any], *, mask: Mask | None = None
) -> Stats:
    """The statistics that the plan's methods declare, for ``flora.init(..., stats=)``.

    Args:
      apply: ``apply(params, batch)`` runs the model; any float output that depends on the weights.
      params: the base.
      batches: what the statistics are of; not read when no method asks for any.
      mask: ``mask(batch)`` gives 0/1 per row of activations (e.g. ``[B, T]``): padding at 0.

    Returns:
      ``{path: {statistic: array}}`` of the data-dependent entries.

    Raises:
      FloraError: no batches, or a weight that the model never contracts.

    >>> import jax.numpy as jnp
    >>> import flora_jax as flora
    >>> from flora_jax.core import ops
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> plan = flora.plan(params, {"kernel": flora.KORE(rank=2)})
    >>> run = lambda p, x: ops.dot(x, p["kernel"])
    >>> stats = flora.calibrate(run, params, plan, [jnp.eye(2, 4)])
    >>> adapters = flora.init(plan, jax.random.key(0), params, stats=stats)
    """
    if not data_dependent(plan):
        return {}
    calibration = Calibration(apply, params, plan, mask)
    for batch in batches:
        calibration.add(batch)
    return calibration.stats


class Calibration:
    """:func:`calibrate` batch by batch; weights with the same inputs (q, k, v) share one set.

    Which do is found on the first batch: those whose sums of x and of |x| agree to the last bit.
    """

    def __init__(self, apply: Apply, params: Any, plan: Plan, mask: Mask | None = None):
        self.entries = {entry.path: entry for entry in data_dependent(plan)}
        self._apply, self._params, self._mask = apply, params, mask
        self._leader: dict[str, str] = {}
        self._observer: Observer | None = None

    @property
    def batches(self) -> int:
        """Batches counted in so far."""
        return 0 if self._observer is None else self._observer.batches

    def add(self, batch: Any) -> None:
        """Counts one more batch in; earlier values of :attr:`stats` are used up by it."""
        if self._observer is None:
            self._leader = self._leaders(batch)
            names: dict[str, tuple[str, ...]] = {}
            for path, leader in self._leader.items():
                both = (*names.get(leader, ()), *self.entries[path].adapter.statistics)
                names[leader] = tuple(dict.fromkeys(both))
            self._observer = self._watch(names)
        self._observer.add(batch)

    @property
    def stats(self) -> Stats:
        """``{path: {statistic: array}}`` of all batches so far.

        Raises:
          FloraError: there were none.
        """
        if self._observer is None:
            raise FloraError(f"{next(iter(self.entries))} starts from its inputs: got no batches")
        found = self._observer.stats
        return {
            path: {name: found[leader][name] for name in self.entries[path].adapter.statistics}
            for path, leader in self._leader.items()
        }

    def _watch(self, names: dict[str, tuple[str, ...]]) -> Observer:
        layout = {path: self.entries[path].spec for path in names}
        return Observer(self._apply, self._params, names, layout, self._mask)

    def _leaders(self, batch: Any) -> dict[str, str]:
        """Each path and the first path that has the same inputs."""
        size = {
            path: (e.stack, statistic_shape("gram", e.spec.unstacked(), e.kernel_shape))
            for path, e in self.entries.items()
        }
        if len(set(size.values())) == len(size):
            return {path: path for path in size}
        observer = self._watch(dict.fromkeys(size, ("sum", "abs_sum")))
        observer.add(batch)
        leader: dict[Any, str] = {}
        out = {}
        for path, found in observer.stats.items():
            seen = [np.asarray(found[name]) for name in ("sum", "abs_sum")]
            # inputs that are zero so far say nothing about later batches
            told = path if not seen[1].any() else (size[path], *(a.tobytes() for a in seen))
            out[path] = leader.setdefault(told, path)
        return out
