"""The data-dependent start of a run: which data, which positions, and what comes of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

import flora_jax as flora
from flora_jax import training
from flora_jax.adapters.eva import EVA
from flora_jax.core.calibrate import Stats, data_dependent
from flora_jax.core.errors import ConfigError
from flora_jax.launch.first_task import Retention
from flora_jax.launch.subjects import Subject
from flora_jax.training import distributed
from flora_jax.training.losses import Loss


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """Takes the statistics that a run's methods start from.

    Args:
      subject: the model; its ``params`` are the base as trained on (quantised, on the mesh).
      options: the arguments of ``train``.
      mesh: where it runs, or None for one device.
    """

    subject: Subject
    options: Mapping[str, Any]
    mesh: Any = None

    def start(self, plan: flora.Plan, *, move: bool) -> tuple[flora.Plan, Stats]:
        """The statistics for ``init``, and the plan, in which EVA's ranks have moved if asked to.

        EVA reads the inputs of the task to be learned, at the positions that are trained on. All
        others read those of what is to be kept, but for padding: ``calibration_data``, else the
        task that the base was made for where that is known, else the training data.
        """
        if not data_dependent(plan):
            return plan, {}
        eva = flora.Plan(tuple(e for e in plan if isinstance(e.adapter, EVA)))
        rest = flora.Plan(tuple(e for e in plan if not isinstance(e.adapter, EVA)))
        loss, data, heads = self._old_task()
        stats = self._calibrate(rest, loss, data, heads, trained=False)
        if not move:
            stats |= self._calibrate(eva, self.subject.loss, self.options["data"], {}, trained=True)
        elif len(eva):
            found = self._eva(eva)
            stats |= found.stats
            kept = {entry.path: entry for entry in (*rest, *found.plan)}
            plan = flora.Plan(tuple(kept[e.path] for e in plan if e.path in kept))
        # the next steps are the same on every process and need no mesh
        return plan, jax.tree.map(_whole, stats)

    def _old_task(self) -> tuple[Loss, Any, Mapping[str, Any]]:
        """Loss, data and heads of what is to be kept."""
        given, known = self.options["calibration_data"], self.subject.retention
        if given is None and isinstance(known, Retention):
            return known.loss, known.data, known.heads
        return self.subject.loss, self.options["data"] if given is None else given, {}

    def _calibrate(self, plan, loss, data, heads, *, trained: bool) -> Stats:
        run, mask = _run(loss, heads), _positions(loss, trained)
        return flora.calibrate(run, self.subject.params, plan, self._batches(data), mask=mask)

    def _eva(self, plan: flora.Plan) -> Any:
        loss, params = self.subject.loss, self.subject.params
        batches = self._batches(self.options["data"])
        found = flora.eva(_run(loss, {}), params, plan, batches, mask=_positions(loss, True))
        how = "all" if found.converged else "not all"
        print(f"EVA: ranks after {found.batches} batches, {how} components have converged")
        return found

    def _batches(self, data: Any) -> Iterator[Any]:
        """The first so many training batches, on the mesh."""
        count = self.options["calibration_batches"]
        if count < 1:
            raise ConfigError(f"train.calibration_batches={count} must be positive")
        shard = (jax.process_index(), jax.process_count())
        size, seed = self.options["batch_size"], self.options["seed"]
        batches = data.train(self.subject.tokenizer, size, seed=seed, shard=shard)
        for batch in itertools.islice(iter(batches), count):
            if self.mesh is None:
                yield batch
            else:
                yield distributed.global_batch(batch, training.batch_sharding(self.mesh))


def _run(loss: Loss, heads: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """The model as a function of parameters and batch: its loss, all of whose weights it reads."""
    return lambda params, batch: loss({**params, **heads}, batch, None, False)[0]


def _positions(loss: Loss, trained: bool) -> Callable[[Any], Any] | None:
    """The mask of a loss that can say which positions count."""
    positions = getattr(loss, "positions", None)
    return None if positions is None else functools.partial(positions, trained=trained)


def _whole(array: jax.Array) -> Any:
    """An array of a mesh as one of this process."""
    if jax.process_count() > 1 and not array.is_fully_replicated:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return jax.device_get(array)
