"""The plan: which adapter each weight gets. Static, hashable, JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import adapter as protocol
from flora_jax.core import paths
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import FloraError, PlanError, StructureError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.observe import statistic_shape
from flora_jax.core.registry import name_of
from flora_jax.core.spec import KernelSpec, Stored, infer

Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclasses.dataclass(frozen=True)
class Entry(Stored):
    """One adapted weight: its path, adapter, layout and the arrays the adapter owns."""

    path: str
    adapter: Adapter
    spec: KernelSpec
    shape: tuple[int, ...]
    dtype: str
    train: Shapes
    frozen: Shapes

    @property
    def count(self) -> int:
        """Trained numbers of this weight."""
        return self.adapter.count({name: shape for name, shape, _ in self.train})

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "adapter": self.adapter.to_json(),
            "spec": self.spec.to_json(),
            "shape": list(self.shape),
            "dtype": self.dtype,
        }


@dataclasses.dataclass(frozen=True)
class Pool:
    """Arrays that all weights of one adapter configuration share, at ``pool/<method>``."""

    path: str
    adapter: Adapter
    entries: tuple[Entry, ...]
    train: Shapes
    frozen: Shapes

    @property
    def count(self) -> int:
        """Trained numbers, counted once however many weights share them."""
        return sum(math.prod(shape) for _, shape, _ in self.train)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries in path order. Equal plans are equal objects: use it as a static jit argument."""

    entries: tuple[Entry, ...]

    @functools.cached_property
    def pools(self) -> tuple[Pool, ...]:
        """One pool for each configuration of a method that shares arrays, in order of first use."""
        sharing: dict[Adapter, list[Entry]] = {}
        for entry in self.entries:
            if entry.adapter.pooled:
                sharing.setdefault(entry.adapter, []).append(entry)
        taken: dict[str, int] = {}
        return tuple(_make_pool(a, tuple(e), taken) for a, e in sharing.items())

    def pool_of(self, adapter: Adapter) -> Pool | None:
        """The pool of a configuration, or None."""
        return next((pool for pool in self.pools if pool.adapter == adapter), None)

    @property
    def owners(self) -> tuple[Entry | Pool, ...]:
        """Everything that owns arrays: the entries, then the pools."""
        return (*self.entries, *self.pools)

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, path: str) -> Entry:
        for entry in self.entries:
            if entry.path == path:
                return entry
        near = ", ".join(paths.nearest(path, [e.path for e in self.entries]))
        raise PlanError(f"the plan has no {path!r}; nearest: {near}")

    @property
    def count(self) -> int:
        """Trained numbers in all."""
        return sum(owner.count for owner in self.owners)

    def shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The adapters that the plan calls for, ``{path: {name: ShapeDtypeStruct}}``."""
        return {
            owner.path: {
                name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
                for name, shape, dtype in (*owner.train, *owner.frozen)
            }
            for owner in self.owners
        }

    def to_json(self) -> str:
        """The plan as JSON text; :meth:`from_json` gives an equal plan."""
        return json.dumps({"version": 1, "entries": [e.to_json() for e in self]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from :meth:`to_json` text.

        Raises:
          PlanError: not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != 1:
                raise PlanError(f"plan version {data['version']} is not 1")
            rows = [
                (
                    e["path"],
                    protocol.from_json(e["adapter"]),
                    KernelSpec.from_json(e["spec"]),
                    tuple(e["shape"]),
                    e["dtype"],
                )
                for e in data["entries"]
            ]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PlanError(f"not a plan: {error!r}") from None
        return cls(tuple(make_entry(*row) for row in rows))

    def fingerprint(self) -> str:
        """Twelve hex digits that change when anything in the plan does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def table(
        self, total: int | None = None, trained: Mapping[str, int] | None = None
    ) -> str:
        """Text table: path, shape, kind, adapter, trained numbers; totals in the last line.

        Args:
          total: size of the whole model, for the trained share.
          trained: ``{path: numbers}``, for an optimizer that moves only some of them.
        """
        counts = {owner.path: owner.count for owner in self.owners} | dict(trained or {})
        count = sum(counts.values())
        rows = [("path", "shape", "kind", "adapter", "trained")]
        for e in self.entries:
            shape = "x".join(map(str, e.shape))
            rows.append((e.path, shape, e.spec.kind, describe(e.adapter), f"{counts[e.path]:,}"))
        for pool in self.pools:
            what = f"{len(pool.entries)} weights"
            numbers = f"{counts[pool.path]:,}"
            rows.append((pool.path, what, "shared", describe(pool.adapter), numbers))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        share = "" if total is None else f" of {total:,} ({100 * count / total:.3f} %)"
        return "\n".join([*lines, f"{len(self)} weights, {count:,} trained numbers{share}"])


def describe(adapter: Adapter) -> str:
    """Method name and the fields that differ from their defaults."""
    changed = [
        f"{f.name}={getattr(adapter, f.name)}"
        for f in dataclasses.fields(adapter)
        if getattr(adapter, f.name) != f.default
    ]
    return f"{name_of(adapter)}({', '.join(changed)})"


def make_entry(
    path: str, adapter: Adapter, spec: KernelSpec, shape: tuple[int, ...], dtype: str
) -> Entry:
    """Check that an adapter fits a weight and find the shapes of its arrays.

    Raises:
      PlanError: it does not fit; the message starts with the path.
    """
    entry = Entry(path, adapter, spec, tuple(shape), str(dtype), (), ())
    if len(entry.kernel_shape) != spec.ndim or len(entry.stack) != spec.stack_ndim:
        raise PlanError(f"{path}: shape {shape} does not fit {spec}")
    try:
        adapter.check(spec, entry.kernel_shape)
        train, frozen = jax.eval_shape(*_abstract_init(entry))
    except FloraError as error:
        raise type(error)(f"{path}: {error}") from None
    lead = () if adapter.whole_stack else entry.stack
    return dataclasses.replace(entry, train=_shapes(train, lead), frozen=_shapes(frozen, lead))


def _abstract_init(entry: Entry) -> tuple[Any, ...]:
    """The adapter's ``init`` and abstract arguments for it."""
    adapter, spec = entry.adapter, entry.spec
    spec = spec if adapter.whole_stack else spec.unstacked()
    shape = entry.shape if adapter.whole_stack else entry.kernel_shape
    base = jax.ShapeDtypeStruct(shape, jnp.dtype(entry.dtype))
    key = jax.eval_shape(lambda: jax.random.key(0))
    if not adapter.statistics:
        return lambda k, b: adapter.init(k, spec, b), key, base
    lead, inner = (entry.stack if adapter.whole_stack else ()), entry.spec.unstacked()
    stats = {
        name: jax.ShapeDtypeStruct(
            lead + statistic_shape(name, inner, entry.kernel_shape), jnp.float32
        )
        for name in adapter.statistics
    }
    return lambda k, b, s: adapter.init(k, spec, b, s), key, base, stats


def _shapes(tree: Mapping[str, Any], lead: tuple[int, ...] = ()) -> Shapes:
    return tuple((name, lead + leaf.shape, str(leaf.dtype)) for name, leaf in sorted(tree.items()))


def _make_pool(adapter: Adapter, entries: tuple[Entry, ...], taken: dict[str, int]) -> Pool:
    name = name_of(adapter)
    taken[name] = taken.get(name, 0) + 1
    path = f"pool/{name}" if taken[name] == 1 else f"pool/{name}_{taken[name]}"
    key = jax.eval_shape(lambda: jax.random.key(0))
    train, frozen = jax.eval_shape(lambda k: adapter.pool(k, entries), key)
    return Pool(path, adapter, entries, _shapes(train), _shapes(frozen))


def plan(
    params: Any,
    rules: Mapping[str, Adapter | None] | Sequence[tuple[str, Adapter | None]],
    *,
    specs: Mapping[str, KernelSpec] | Sequence[tuple[str, KernelSpec]] = (),
) -> Plan:
    """Give each weight that a rule matches its adapter.

    Args:
      params: nested dict of arrays, ShapeDtypeStructs or weight leaves.
      rules: ordered ``{regex: adapter}``; the first match wins; None leaves the weight alone.
      specs: ordered ``{regex: KernelSpec}`` for kernels whose layout the name does not tell.

    Raises:
      RuleError: a rule (or spec rule) matches nothing, or is never reached.
      PlanError: an adapter does not fit its weight.

    >>> params = {"attn": {"q_proj": {"kernel": jnp.zeros((8, 8))}}}
    >>> from flora_jax.adapters import LoRA
    >>> plan(params, {".*/q_proj/kernel": LoRA(rank=2)}).count
    32
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    given = paths.Rules.of(specs).match(leaves)
    chosen = paths.Rules.of(rules).match(leaves)
    entries = []
    for path, adapter in chosen.items():
        if adapter is None:
            continue
        if not isinstance(adapter, Adapter):
            raise PlanError(f"{path}: {adapter!r} is not an adapter")
        leaf = leaves[path]
        spec = given.get(path) or infer(path, tuple(leaf.shape))
        entries.append(make_entry(path, adapter, spec, tuple(leaf.shape), str(leaf.dtype)))
    return Plan(tuple(entries))


def check_adapters(adapters: Mapping[str, Mapping[str, Any]], plan: Plan) -> None:
    """Raise StructureError unless ``adapters`` has the plan's paths, names and shapes.

    Frozen arrays may be absent: :func:`flora_jax.rebase` folds them into the base.
    """
    expected = {owner.path: owner for owner in plan.owners}
    if set(adapters) != set(expected):
        missing = sorted(set(expected) - set(adapters))[:3]
        extra = sorted(set(adapters) - set(expected))[:3]
        raise StructureError(f"adapters and plan differ: missing {missing}, not in plan {extra}")
    for path, entry in expected.items():
        named = {**{n: s for n, s, _ in entry.train}, **{n: s for n, s, _ in entry.frozen}}
        required = {n for n, _, _ in entry.train}
        given = adapters[path]
        if not required <= set(given) or not set(given) <= set(named):
            raise StructureError(f"{path}: arrays {sorted(given)}, the plan says {sorted(named)}")
        for name, array in given.items():
            if tuple(array.shape) != named[name]:
                raise StructureError(
                    f"{path}/{name}: shape {tuple(array.shape)}, the plan says {named[name]}"
                )
