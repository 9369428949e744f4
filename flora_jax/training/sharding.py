"""Meshes and shardings: rules for the base, derived for adapters and optimizer state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flora_jax.core import paths
from flora_jax.core.errors import ConfigError, StructureError, unknown
from flora_jax.core.leaf import is_leaf
from flora_jax.core.plan import Entry, Plan
from flora_jax.training.state import TrainState

BATCH_AXES = ("data", "fsdp")

# A spec names trailing axes, so the same rules fit scanned (stacked) and unrolled blocks.
LLAMA_RULES = (
    (r"(.*/)?embed_tokens/embedding", P("tensor", "fsdp")),
    (r"(.*/)?lm_head/kernel", P("fsdp", "tensor")),
    (r"(.*/)?(q|k|v|gate|up)_proj/kernel", P("fsdp", "tensor")),
    (r"(.*/)?(q|k|v)_proj/bias", P("tensor")),
    (r"(.*/)?(o|down)_proj/kernel", P("tensor", "fsdp")),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with Auto axes from ``{axis name: size}``; one size may be -1 (what is left).

    Args:
      axes: in order, slowest first, e.g. ``{"data": -1, "fsdp": 2, "tensor": 2}``.
      devices: all devices of all processes by default.

    Raises:
      ConfigError: the sizes do not give exactly the number of devices.

    >>> make_mesh({"data": -1, "tensor": 1}).axis_names
    ('data', 'tensor')
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = " x ".join(f"{name}={size}" for name, size in sizes.items())
    if not sizes or len(free) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
        raise ConfigError(f"mesh {text or 'without axes'}: sizes are positive, at most one is -1")
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        near = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"mesh {text} does not divide the {count} devices; axis sizes must multiply to "
            f"{count} (its divisors: {', '.join(map(str, near))})"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _ways(mesh: Mesh, entry: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _pad(spec: P, ndim: int) -> tuple[Any, ...]:
    """The spec's entries for all ``ndim`` axes; a spec names the trailing ones."""
    return (None,) * (ndim - len(spec)) + tuple(spec)


def _known_axes(spec: P, mesh: Mesh) -> P:
    """``spec`` without axes that the mesh lacks."""
    kept = (tuple(n for n in _names(e) if n in mesh.shape) for e in spec)
    return P(*(None if not names else names[0] if len(names) == 1 else names for names in kept))


def base_specs(params: Any, mesh: Mesh, rules: Any = LLAMA_RULES) -> dict[str, P]:
    """``{path: PartitionSpec}`` of every base weight, one entry per logical axis.

    Args:
      rules: ordered ``(regex, PartitionSpec)``; a spec names trailing axes. Weights that no rule
        matches are replicated. The default rules drop axes that the mesh lacks.

    Raises:
      RuleError: a rule of yours matches nothing.
      ConfigError: a spec names an axis that the mesh lacks.
      StructureError: a spec is too long for a weight, or does not divide one of its axes.
    """
    leaves = paths.flatten(params, is_leaf=is_leaf)
    default = rules is LLAMA_RULES
    chosen = paths.Rules.of(rules).match(leaves, strict=not default)
    specs = {}
    for path, leaf in leaves.items():
        spec = chosen.get(path, P())
        spec = _known_axes(spec, mesh) if default else spec
        specs[path] = P(*_checked(path, tuple(leaf.shape), spec, mesh))
    return specs


def _checked(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> tuple[Any, ...]:
    for name in (n for entry in spec for n in _names(entry)):
        if name not in mesh.shape:
            raise ConfigError(f"{path}: " + unknown("mesh axis", name, mesh.axis_names))
    if len(spec) > len(shape):
        raise StructureError(f"{path}: {spec} has more axes than shape {shape}")
    entries = _pad(spec, len(shape))
    for axis, (size, entry) in enumerate(zip(shape, entries)):
        if size % _ways(mesh, entry):
            raise StructureError(
                f"{path}: axis {axis} of {shape} does not divide into the {_ways(mesh, entry)} "
                f"parts of mesh axis {entry!r}"
            )
    return entries


def _fitting(shape: tuple[int, ...], entries: Sequence[Any], mesh: Mesh) -> NamedSharding:
    """Entries where they divide the shape; the other axes are replicated."""
    kept = (e if size % _ways(mesh, e) == 0 else None for size, e in zip(shape, entries))
    return NamedSharding(mesh, P(*kept))


def base_shardings(params: Any, mesh: Mesh, rules: Any = LLAMA_RULES) -> Any:
    """A tree of shardings like ``params`` for ``jax.device_put``; see :func:`base_specs`.

    The arrays inside a low-bit leaf follow the leaf's spec wherever their sizes divide.
    """
    specs = base_specs(params, mesh, rules)

    def one(path: str, leaf: Any) -> Any:
        spec = tuple(specs[path])
        if not is_leaf(leaf):
            return NamedSharding(mesh, P(*spec))

        def inner(x: Any) -> NamedSharding:
            same = x.ndim == len(spec)
            return _fitting(x.shape, spec if same else (None,) * x.ndim, mesh)

        return jax.tree.map(inner, leaf)

    return paths.map_with_path(one, params, is_leaf=is_leaf)


def adapter_spec(entry: Entry, name: str, shape: tuple[int, ...], spec: P) -> P:
    """The spec of one adapter array, derived from its base weight's spec.

    ``in`` and ``out`` axes follow the kernel's own when a single one, or only the major one, of the
    axes merged into them is sharded; the rank and undeclared axes are replicated; stacks follow.

    Args:
      entry: the plan's entry; ``entry.adapter.dim_names[name]`` says what each axis follows.
      shape: of the stored array, stack axes first.
      spec: of the base weight, one entry per stored axis.
    """
    kernel, n = entry.spec.unstacked(), len(entry.stack)
    stack, inner = tuple(spec)[:n], tuple(spec)[n:]
    if entry.adapter.whole_stack:
        stack, n = (), 0
    dims = entry.adapter.dim_names.get(name, ())
    if dims[-1:] == ("kernel",):
        return P(*stack, *(None,) * (len(dims) - 1), *inner)
    rank = len(shape) - n
    if kernel.batched and rank == len(dims) + 1:
        dims = ("batch", *dims)
    if rank != len(dims):
        dims = (None,) * rank

    def merged(axes: tuple[int, ...]) -> Any:
        minor = any(inner[a] is not None for a in axes[1:])
        return inner[axes[0]] if axes and not minor and kernel.groups == 1 else None

    follow = {
        "in": merged(kernel.in_axes),
        "out": merged(kernel.out_axes),
        "batch": merged(kernel.batch_axes),
    }
    return P(*stack, *(follow.get(dim) for dim in dims))


def adapter_shardings(adapters: Any, plan: Plan, specs: Mapping[str, P], mesh: Mesh) -> Any:
    """Shardings of ``{path: {name: array}}`` from the base weights' specs (:func:`base_specs`)."""

    shared = {pool.path for pool in plan.pools}

    def one(path: str, name: str, array: Any) -> NamedSharding:
        if path in shared:
            return NamedSharding(mesh, P())
        spec = adapter_spec(plan[path], name, tuple(array.shape), specs[path])
        return _fitting(array.shape, tuple(spec), mesh)

    return {
        path: {name: one(path, name, array) for name, array in arrays.items()}
        for path, arrays in adapters.items()
    }


def state_shardings(
    state: TrainState, plan: Plan, specs: Mapping[str, P], mesh: Mesh
) -> TrainState:
    """Shardings of a train state: adapters derived, optimizer moments like their parameter."""
    replicated = NamedSharding(mesh, P())
    train = adapter_shardings(state.train, plan, specs, mesh)
    flat = {
        path: (s, x.shape)
        for (path, s), x in zip(
            paths.flatten(train).items(), jax.tree.leaves(state.train), strict=True
        )
    }

    def moment(path: str, x: Any) -> NamedSharding:
        # a moment's path ends with its parameter's; a factored one has another shape
        parts = path.split("/")
        for start in range(len(parts)):
            sharding, shape = flat.get("/".join(parts[start:]), (None, None))
            if shape == getattr(x, "shape", None) and sharding is not None:
                return sharding
        return replicated

    return dataclasses.replace(
        state,
        step=replicated,
        rng=replicated,
        train=train,
        frozen=adapter_shardings(state.frozen, plan, specs, mesh),
        opt_state=paths.map_with_path(moment, state.opt_state),
    )


def members_shardings(
    states: TrainState, plan: Plan, specs: Mapping[str, P], mesh: Mesh
) -> TrainState:
    """Shardings of stacked members: those of one, the member axis over mesh axis ``member``.

    Without such an axis, or where it does not divide the members, their axis is replicated.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
    count = states.step.shape[0]
    lead = "member" if count % mesh.shape.get("member", count + 1) == 0 else None
    stack = lambda s: NamedSharding(mesh, P(lead, *s.spec))  # noqa: E731
    return jax.tree.map(stack, state_shardings(one, plan, specs, mesh))


def batch_sharding(mesh: Mesh, axes: Sequence[str] = BATCH_AXES) -> NamedSharding:
    """The first axis of every batch array over the data-like mesh axes; the rest replicated."""
    names = tuple(name for name in axes if name in mesh.shape)
    return NamedSharding(mesh, P(names) if names else P())
