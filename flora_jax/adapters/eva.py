"""EVA: LoRA along the directions its inputs vary in, with ranks where they vary most."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters.lora import LoRA
from flora_jax.core.calibrate import Apply, Calibration, Mask, Stats
from flora_jax.core.errors import FloraError, PlanError
from flora_jax.core.initialize import layer_by_layer
from flora_jax.core.linalg import fix_signs
from flora_jax.core.plan import Entry, Plan, make_entry
from flora_jax.core.registry import register


class Components(NamedTuple):
    """Principal components of a weight's inputs, the largest first.

    Args:
      vectors: ``[..., in, k]``, orthonormal columns; the largest entry of each is positive.
      values: ``[..., k]``, squared singular values of the (centred) inputs.
      ratios: ``[..., k]``, the share of the whole variance that each explains.
    """

    vectors: jax.Array
    values: jax.Array
    ratios: jax.Array


def components(stats: Mapping[str, jax.Array], k: int, center: bool = True) -> Components:
    """The first k components from ``gram [..., in, in]``, ``sum [..., in]`` and ``count``.

    ``X^T X - n m m^T`` with the mean m, or ``X^T X`` alone: exact however the rows were batched.
    """
    scatter = stats["gram"].astype(jnp.float32)
    if center:
        total, count = stats["sum"].astype(jnp.float32), stats["count"]
        count = count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
        total = total / jnp.sqrt(jnp.maximum(count, 1.0))
        scatter = scatter - total[..., :, None] * total[..., None, :]
    values, vectors = jnp.linalg.eigh(scatter)
    values = jnp.maximum(values[..., : -k - 1 : -1], 0.0)
    vectors = vectors[..., : -k - 1 : -1]
    vectors, _ = fix_signs(vectors, jnp.swapaxes(vectors, -1, -2))
    whole = jnp.trace(scatter, axis1=-2, axis2=-1)[..., None]
    return Components(vectors, values, values / jnp.where(whole > 0, whole, 1.0))


@register(
    "EVA",
    family="adapter",
    paper="One Initialization to Rule Them All: Fine-tuning via Explained Variance Adaptation",
    arxiv="2410.07170",
    parameters="sum of r_l (in + out)",
    peft="LORA (init_lora_weights=eva)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    """LoRA with ``a [in, r]`` = the top r principal components of the layer's inputs, ``b = 0``.

    It needs statistics: of :func:`flora_jax.calibrate` (rank r everywhere), or of
    :func:`flora_jax.eva`, which also moves ranks to where inputs have more variance to explain.

    The components come from the covariance, accumulated as ``X^T X [in, in]`` and factored by
    ``eigh``, where the paper and HF PEFT update a truncated SVD batch by batch. The sum is exact
    (truncation is not), does not depend on the batches, adds up over devices and takes batches of
    fewer rows than components; it holds ``4 in^2`` bytes a layer and costs ``O(in^3)`` a check.

    Args:
      center: subtract the mean of the inputs, as HF PEFT's ``IncrementalPCA`` does; the paper's
        text has the SVD of the inputs themselves (False).
      whiten: divide component i by ``sqrt(singular value i)``.
      rho: at most ``round(rho r)`` components for one weight, when ranks are moved.
      tau: a component has converged when its cosine with that before the last batch reaches tau.
      ranks: of each layer of a scanned stack (with batch axes of each batch), set by
        :func:`flora_jax.eva`; ``rank`` is the widest of them. The columns of a beyond a layer's own
        are zero, and so are the rows of b: they never get a gradient.
      rank, alpha, rslora, dropout, use_bias: as in LoRA; ``initializer`` has no use.

    Source: arXiv 2410.07170, HF PEFT ``tuners/lora/eva.py`` (read for the mean, the budget and the
    convergence test). PEFT whitens layers that share an input twice; here once.

    >>> import flora_jax as flora
    >>> flora.plan({"kernel": jnp.ones((6, 4))}, {"kernel": EVA(rank=2)}).count
    20
    """

    center: bool = True
    whiten: bool = False
    rho: float = 2.0
    tau: float = 0.99
    ranks: tuple[int, ...] = ()

    kinds = ("dense", "einsum", "conv", "conv_transpose")
    statistics = ("gram", "sum", "count")

    def check(self, spec, shape):
        super().check(spec, shape)
        if not self.rho >= 1.0:
            raise PlanError(f"rho={self.rho} is below 1: the ranks could not all be given out")
        if not 0.0 < self.tau <= 1.0:
            raise PlanError(f"tau={self.tau} is outside (0, 1]")
        if self.initializer != "kaiming":
            raise PlanError(f"initializer={self.initializer!r}: EVA starts from the inputs")
        if self.ranks and not (min(self.ranks) >= 0 and max(self.ranks) == self.rank):
            raise PlanError(f"ranks={self.ranks}: the widest of them is not rank={self.rank}")

    def init(self, key, spec, base, stats):
        train, _ = super().init(key, spec, base)
        found = components(stats, self.rank, self.center)
        a = found.vectors
        if self.whiten:
            root = jnp.where(found.values > 0, found.values, 1.0) ** 0.25
            a = a / root[..., None, :]
        return {**train, "a": a}, {}

    def finish(self, arrays):
        if not self.ranks:
            return arrays
        a = arrays["a"]
        if len(self.ranks) != math.prod(a.shape[:-2]):
            raise PlanError(f"{len(self.ranks)} ranks for a stack of {math.prod(a.shape[:-2])}")
        ranks = jnp.array(self.ranks).reshape(*a.shape[:-2], 1, 1)
        return {**arrays, "a": jnp.where(jnp.arange(self.rank) < ranks, a, 0.0)}

    def count(self, arrays):
        if not self.ranks:
            return super().count(arrays)
        padding = sum(self.rank - rank for rank in self.ranks)
        return super().count(arrays) - padding * (arrays["a"][-2] + arrays["b"][-1])


class Start(NamedTuple):
    """What :func:`eva` found.

    Args:
      plan: with ranks where the variance is; weights that got none are gone.
      stats: for ``flora.init(plan, key, params, stats=stats)``.
      batches: how many were used.
      converged: whether every component that is needed had converged.
    """

    plan: Plan
    stats: Stats
    batches: int
    converged: bool


def eva(
    apply: Apply, params: Any, plan: Plan, batches: Iterable[Any], *, mask: Mask | None = None
) -> Start:
    """Statistics for a plan with EVA adapters, and its ranks given out by explained variance.

    All components of all weights (and layers of a stack) compete: with the budget
    ``R = sum r_l`` the R largest shares of their weight's variance win, at most ``round(rho r)`` of
    one weight. The scale ``alpha / r`` stays what it was everywhere. Ranks are given out anew after
    every batch; batches end early when the cosine of each needed component with that of the batch
    before is at least ``tau``.

    Args:
      apply: ``apply(params, batch)`` runs the model; any float output that depends on the weights.
      plan: with EVA adapters; the other entries stay as they are (their statistics are taken too).
      batches: of the data to be trained on.
      mask: ``mask(batch)`` gives 0/1 per row of activations, e.g. the positions trained on.

    Raises:
      PlanError: the plan has no EVA adapter, or its ranks were given out already.
      FloraError: no batches.
    """
    entries = [entry for entry in plan if isinstance(entry.adapter, EVA)]
    if not entries:
        raise PlanError("the plan has no EVA adapter")
    for entry in entries:
        if entry.adapter.ranks:
            raise PlanError(f"{entry.path}: its ranks were given out already; use flora.calibrate")
    calibration = Calibration(apply, params, plan, mask)
    found: dict[str, Components] = {}
    ranks: dict[str, np.ndarray] = {}
    converged = False
    for batch in batches:
        calibration.add(batch)
        before, found = found, _components(entries, calibration.stats)
        ranks = allocate(entries, {path: np.asarray(c.ratios) for path, c in found.items()})
        converged = bool(before) and all(
            _same(before[e.path], found[e.path], ranks[e.path], e.adapter.tau) for e in entries
        )
        if converged:
            break
    if not found:
        raise FloraError(f"{entries[0].path} starts from its inputs: got no batches")
    stats = calibration.stats
    moved = with_ranks(plan, ranks)
    stats = {entry.path: stats[entry.path] for entry in moved if entry.path in stats}
    return Start(moved, stats, calibration.batches, converged)


def limit(entry: Entry) -> int:
    """The most components that one matrix of an entry may get."""
    _, n_in, n_out = entry.spec.unstacked().sizes(entry.kernel_shape)
    return min(round(entry.adapter.rho * entry.adapter.rank), n_in, n_out)


@functools.partial(jax.jit, static_argnames=("k", "center", "ndim"))
def _top(stats: Mapping[str, jax.Array], k: int, center: bool, ndim: int) -> Components:
    return layer_by_layer(lambda s: components(s, k, center), ndim)(stats)


def _components(entries: Iterable[Entry], stats: Stats) -> dict[str, Components]:
    """Of each entry; those that share their inputs' statistics are factored once."""
    done: dict[Any, Components] = {}
    out = {}
    for entry in entries:
        own, k = stats[entry.path], limit(entry)
        same = (id(own["gram"]), k, entry.adapter.center)
        if same not in done:
            done[same] = _top(own, k, entry.adapter.center, len(entry.stack))
        out[entry.path] = done[same]
    return out


def _same(before: Components, after: Components, ranks: np.ndarray, tau: float) -> bool:
    """Whether the components below each matrix's rank point where they did."""
    cosine = np.abs(np.einsum("...ik,...ik->...k", before.vectors, after.vectors))
    return bool((cosine >= tau)[np.arange(cosine.shape[-1]) < ranks[..., None]].all())


def allocate(entries: Iterable[Entry], ratios: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ranks ``{path: [*stack, *batch]}`` of the budget's largest explained-variance ratios.

    Ties go to the earlier component, then the earlier path, then the earlier layer.

    Args:
      ratios: ``{path: [*stack, *batch, k]}``, falling along k.
    """
    entries = list(entries)
    rows = []
    budget = 0
    for place, entry in enumerate(entries):
        flat = np.asarray(ratios[entry.path], np.float64)
        flat = flat.reshape(-1, flat.shape[-1])
        budget += entry.adapter.rank * len(flat)
        layer, component = np.indices(flat.shape)
        columns = (-flat, component, np.full(flat.shape, place), layer)
        rows.append(np.stack([column.ravel() for column in columns]))
    value, component, place, layer = np.concatenate(rows, axis=1)
    taken = np.lexsort((layer, place, component, value))[:budget]
    out = {}
    for index, entry in enumerate(entries):
        shape = ratios[entry.path].shape[:-1]
        own = layer[taken][place[taken] == index].astype(int)
        out[entry.path] = np.bincount(own, minlength=math.prod(shape)).reshape(shape)
    return out


def with_ranks(plan: Plan, ranks: Mapping[str, np.ndarray]) -> Plan:
    """The plan with new ranks and the scales it had; a weight whose ranks are 0 loses its entry."""
    entries = []
    for entry in plan:
        if entry.path not in ranks:
            entries.append(entry)
            continue
        own = [int(rank) for rank in ranks[entry.path].ravel()]
        if not any(own):
            continue
        adapter, widest = entry.adapter, max(own)
        alpha = adapter.scale * (math.sqrt(widest) if adapter.rslora else widest)
        alpha = adapter.alpha if widest == adapter.rank else alpha
        uneven = tuple(own) if set(own) != {widest} else ()
        new = dataclasses.replace(adapter, rank=widest, alpha=alpha, ranks=uneven)
        entries.append(make_entry(entry.path, new, entry.spec, entry.shape, entry.dtype))
    return Plan(tuple(entries))
