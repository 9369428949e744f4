"""Activation statistics without hooks: the statistic as a gradient.

An :class:`Observed` leaf carries zero-valued probes. Its contraction passes activations through
unchanged; its backward rule returns the statistic (X^T X, sums ...) as the "gradient" of the
probe. One ``jax.grad`` over the probes therefore collects them from any model, under scan, remat,
jit and a mesh, and nothing is stored per token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flora_jax.core import paths
from flora_jax.core.contraction import Contraction, Lookup
from flora_jax.core.errors import FloraError, PlanError, unknown
from flora_jax.core.leaf import Weight, WeightLeaf, contract, dense, is_leaf
from flora_jax.core.spec import KernelSpec, infer

STATISTICS = ("gram", "sum", "abs_sum", "max", "count")
Probe = dict[str, jax.Array]


def statistic_shape(name: str, spec: KernelSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a statistic of an unstacked kernel: ``[B, in, in]``, ``[B, in]`` or ``()``."""
    *batch, n_in, _ = spec.canonical_shape(shape)
    tail = {"gram": (n_in, n_in), "count": (), "uses": ()}.get(name, (n_in,))
    return tail if name in ("count", "uses") else (*batch, *tail)


def statistics(names: Sequence[str], z: jax.Array, mask: jax.Array | None, batched: bool) -> Probe:
    """Statistics of canonical inputs ``z [..., in]`` (``[B, ..., in]``) in float32.

    ``gram = X^T X``, ``sum``, ``abs_sum``, ``max`` of |x|, ``count`` of rows; masked rows count 0.
    """
    z = z.astype(jnp.float32)
    lead = z.shape[:1] if batched else ()
    rows = z.reshape(*lead, -1, z.shape[-1])
    keep = jnp.ones((rows.shape[-2],)) if mask is None else mask.reshape(-1).astype(jnp.float32)
    if keep.shape[0] != rows.shape[-2]:
        raise PlanError(f"a mask of {keep.shape[0]} rows for {rows.shape[-2]} rows of activations")
    x = rows * keep[:, None]
    made = {
        "gram": lambda: jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=lax.Precision.HIGHEST),
        "sum": lambda: x.sum(-2),
        "abs_sum": lambda: jnp.abs(x).sum(-2),
        "max": lambda: jnp.abs(x).max(-2),
        "count": lambda: keep.sum(),
    }
    return {name: made[name]() for name in names} | {"uses": jnp.ones(())}


def id_statistics(names: Sequence[str], ids: jax.Array, mask: jax.Array, vocabulary: int) -> Probe:
    """Statistics of an embedding's one-hot inputs: ``sum = abs_sum`` = how often each id occurs."""
    keep = mask.reshape(-1).astype(jnp.float32)
    counts = jnp.zeros(vocabulary).at[ids.reshape(-1)].add(keep)
    made = {"sum": counts, "abs_sum": counts, "max": jnp.minimum(counts, 1.0), "count": keep.sum()}
    return {name: made[name] for name in names} | {"uses": jnp.ones(())}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(measure: Callable[[Any], Probe], y: jax.Array, z: Any, probe: Probe) -> jax.Array:
    return y


def _tap_forward(measure, y, z, probe):
    return y, z


def _tap_backward(measure, z, g):
    if jnp.issubdtype(z.dtype, jnp.floating):
        no_gradient = jnp.zeros_like(z)
    else:
        no_gradient = np.zeros(z.shape, jax.dtypes.float0)
    return g, no_gradient, measure(z)


_tap.defvjp(_tap_forward, _tap_backward)


def _rows(mask: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
    """A mask for rows of activations of a shape.

    It repeats over further axes of the rows (one flag per image, rows per patch); where the rows
    have fewer axes (a head on pooled tokens) a row counts if any of its positions does.

    Raises:
      PlanError: the shapes do not go together.
    """
    if mask.shape == shape[: mask.ndim]:
        return jnp.broadcast_to(mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim)), shape)
    if mask.shape[: len(shape)] == shape:
        return mask.reshape(*shape, -1).max(-1)
    if math.prod(mask.shape) == math.prod(shape):
        return mask.reshape(shape)
    raise PlanError(f"{path}: a mask of shape {mask.shape} for rows of activations {shape}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed(WeightLeaf):
    """A weight whose contraction reports statistics of its inputs."""

    base: Weight
    probe: Probe
    mask: jax.Array | None
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    spec: KernelSpec = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return tuple(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        y = contract(how, x, self.base)
        if isinstance(how, Lookup):
            keep = jnp.ones(x.shape) if self.mask is None else _rows(self.mask, x.shape, self.path)
            both = jnp.stack([x, keep.astype(x.dtype)])
            measure = lambda rows: id_statistics(self.names, rows[0], rows[1], self.shape[0])
            return _tap(_Closed(measure), y, both, self.probe)
        _, z = how.unfold(how.enter(x))
        return self._record(y, z, how.spec.batched)

    def _record(self, y: jax.Array, z: jax.Array, batched: bool) -> jax.Array:
        if self.mask is None:
            measure = _Closed(lambda rows: statistics(self.names, rows, None, batched))
            return _tap(measure, y, z, self.probe)
        # The mask rides along as one more channel: a custom_vjp may not close over tracers.
        flag = _rows(self.mask, z.shape[int(batched) : -1], self.path).astype(z.dtype)
        flag = jnp.broadcast_to(flag, z.shape[:-1])[..., None]
        both = jnp.concatenate([z, flag], axis=-1)

        def measure(rows):
            mask = rows[0, ..., -1] if batched else rows[..., -1]
            return statistics(self.names, rows[..., :-1], mask, batched)

        return _tap(_Closed(measure), y, both, self.probe)

    def attend(self, x, precision=None):
        raise PlanError("statistics of a tied head are not collected; observe the lookup only")

    def dense(self, dtype=None):
        return dense(self.base, dtype)


class _Closed:
    """A callable that custom_vjp may hold as a static argument."""

    def __init__(self, f: Callable[[Any], Probe]):
        self.f = f

    def __call__(self, z: Any) -> Probe:
        return self.f(z)


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in STATISTICS:
            raise FloraError(unknown("statistic", name, STATISTICS))
    return tuple(names)


def observe(
    apply: Callable[[Any, Any], Any],
    params: Any,
    rules: Mapping[str, Any] | Sequence[str],
    batches: Iterable[Any],
    *,
    statistics: Sequence[str] = ("gram", "sum", "abs_sum", "max", "count"),
    mask: Callable[[Any], jax.Array] | None = None,
    specs: Mapping[str, KernelSpec] | Sequence[tuple[str, KernelSpec]] = (),
) -> dict[str, Probe]:
    """Statistics of the inputs of chosen weights, summed over batches.

    Args:
      apply: ``apply(params, batch)`` runs the model; any float output that depends on the weights.
      params: the base (arrays or weight leaves; it may be a bound tree).
      rules: regexes of paths, a list or a dict with any values.
      statistics: some of ``gram`` ([in, in]), ``sum``, ``abs_sum``, ``max`` (|x|), ``count``.
      mask: ``mask(batch)`` gives 0/1 per row of activations (e.g. ``[B, T]``); rows at 0 count not.
      specs: as in :func:`flora_jax.plan`.

    Returns:
      ``{path: {statistic: array}}``; stacked weights have stacked statistics, canonical inputs.

    Raises:
      RuleError: a rule matches nothing.
      FloraError: unknown statistic; a weight was never contracted; ``max`` of a weight that is
        used several times in one pass (gradients add up, so its maximum would be a sum).

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> from flora_jax.core import ops
    >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])]
    >>> run = lambda p, x: ops.dot(x, p["kernel"])
    >>> observe(run, params, ["kernel"], batches)["kernel"]["gram"].tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    names = _check_names(statistics)
    leaves = paths.flatten(params, is_leaf=is_leaf)
    pairs = rules.items() if isinstance(rules, Mapping) else [(rule, True) for rule in rules]
    chosen = paths.Rules.of(list(pairs)).match(leaves)
    given = paths.Rules.of(specs).match(leaves)
    layout = {p: given.get(p) or infer(p, tuple(leaves[p].shape)) for p in chosen}
    observer = Observer(apply, params, dict.fromkeys(chosen, names), layout, mask)
    for batch in batches:
        observer.add(batch)
    return observer.stats


class Observer:
    """Statistics that grow batch by batch; :func:`observe` is the loop over it.

    Args:
      apply, params, mask: as for :func:`observe`.
      names: ``{path: statistics}``, of each weight its own.
      layout: ``{path: spec}`` of the same weights.
    """

    def __init__(
        self,
        apply: Callable[[Any, Any], Any],
        params: Any,
        names: Mapping[str, tuple[str, ...]],
        layout: Mapping[str, KernelSpec],
        mask: Callable[[Any], jax.Array] | None = None,
    ):
        self.batches = 0
        self._params, self._names, self._sums = params, names, {}
        leaves = paths.flatten(params, is_leaf=is_leaf)
        shapes = {path: tuple(leaves[path].shape) for path in names}

        def total(probes, params, batch):
            rows = None if mask is None else mask(batch)
            outputs = jax.tree.leaves(apply(_attach(params, probes, rows, names, layout), batch))
            return sum(jnp.sum(o) for o in outputs if jnp.issubdtype(o.dtype, jnp.floating))

        def measure(params, batch):
            probes = {p: _zeros(names[p], layout[p], shapes[p]) for p in names}
            return jax.grad(total)(probes, params, batch)

        def merge(path, a, b):
            return jnp.maximum(a, b) if path.endswith("/max") else a + b

        self._measure = jax.jit(measure)
        # the old sums are dead: a gram of every layer is not held twice
        self._merge = jax.jit(functools.partial(paths.map_with_path, merge), donate_argnums=0)

    def add(self, batch: Any) -> None:
        """Counts one more batch in.

        Raises:
          FloraError: a weight was never contracted; ``max`` of a weight that is used twice.
        """
        new = self._measure(self._params, batch)
        if not self.batches:
            for path, found in new.items():
                _check_uses(path, found["uses"], self._names[path])
        self._sums = self._merge(self._sums, new) if self.batches else new
        self.batches += 1

    @property
    def stats(self) -> dict[str, Probe]:
        """``{path: {statistic: array}}`` of all batches so far.

        Raises:
          FloraError: there were none.
        """
        if not self.batches:
            raise FloraError("no batches: there is nothing to take statistics of")
        return {path: {n: s[n] for n in self._names[path]} for path, s in self._sums.items()}


def _zeros(names: tuple[str, ...], spec: KernelSpec, shape: tuple[int, ...]) -> Probe:
    stack = spec.stack_shape(shape)
    if spec.kind == "embedding" and "gram" in names:
        raise FloraError("the gram matrix of an embedding's one-hot inputs is diagonal: take 'sum'")
    inner = spec.unstacked(), shape[len(stack) :]
    return {name: jnp.zeros((*stack, *statistic_shape(name, *inner))) for name in (*names, "uses")}


def _attach(params, probes, mask, names, layout):
    def one(path, leaf):
        if path not in probes:
            return leaf
        spec = layout[path]
        stack = spec.stack_shape(tuple(leaf.shape))
        rows = None if mask is None else jnp.broadcast_to(mask, (*stack, *mask.shape))
        return Observed(leaf, probes[path], rows, names[path], spec.unstacked(), path)

    return paths.map_with_path(one, params, is_leaf=is_leaf)


def _check_uses(path: str, count: jax.Array, names: tuple[str, ...]) -> None:
    count = np.asarray(count)
    if (count == 0).any():
        raise FloraError(f"{path}: the model never contracted this weight")
    if "max" in names and (count > 1).any():
        raise FloraError(f"{path}: used {int(count.max())} times in a pass; 'max' is not sound")
