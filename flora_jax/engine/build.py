"""Plan, arrays and report of an adapter that is put together weight by weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flora_jax.adapters.lora import LoRA
from flora_jax.adapters.replace import Replace
from flora_jax.core.errors import PlanError
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.plan import Entry, Plan, make_entry
from flora_jax.core.spec import KernelSpec
from flora_jax.core.uses import sibling_bias
from flora_jax.engine.changes import Change
from flora_jax.engine.compress import Compressed
from flora_jax.engine.report import Report, Row

Converted = tuple[Plan, AdapterTree, Report]


class Builder:
    """Collects one weight after another; :meth:`done` gives ``(plan, adapters, report)``."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.adapters: AdapterTree = {}
        self.rows: list[Row] = []

    def lora(self, change: Change, kept: Compressed, bias: jax.Array | None = None) -> None:
        """A LoRA of scale 1 whose ``a b`` is the kept change, with the bias's change beside it."""
        if bias is not None and change.spec.kind == "embedding":
            raise PlanError(f"{change.path}: an embedding's LoRA cannot carry a change of a bias")
        adapter = LoRA(rank=kept.rank, alpha=float(kept.rank), use_bias=bias is not None)
        arrays = {"a": kept.a, "b": kept.b}
        if bias is not None:
            arrays["bias"] = bias.reshape(*change.shape[: change.depth], -1)
        self._add(change.path, adapter, change.spec, change.shape, change.dtype, arrays)
        row = Row(change.path, "lora", kept.rank, kept.exact, kept.error, bias is not None)
        self.rows.append(row)

    def replace(self, change: Change, value: jax.Array) -> None:
        """The whole new leaf."""
        self._replace(change.path, change.spec, value)

    def replace_bias(self, change: Change, before: jax.Array, bias: jax.Array) -> None:
        """The new bias of a kernel's layer."""
        spec = KernelSpec.vector(before.ndim - change.depth, stack_ndim=change.depth)
        value = (before.astype(jnp.float32) + bias).astype(before.dtype)
        self._replace(sibling_bias(change.path), spec, value)

    def _replace(self, path: str, spec: KernelSpec, value: jax.Array) -> None:
        shape, dtype = tuple(value.shape), str(value.dtype)
        self._add(path, Replace(), spec, shape, dtype, {"value": value})
        self.rows.append(Row(path, "replace", 0, True, 0.0))

    def _add(self, path, adapter, spec, shape, dtype, arrays) -> None:
        self.entries.append(make_entry(path, adapter, spec, shape, dtype))
        self.adapters[path] = arrays

    def done(self) -> Converted:
        """The finished adapter, in path order."""
        entries = tuple(sorted(self.entries, key=lambda entry: entry.path))
        adapters = {entry.path: self.adapters[entry.path] for entry in entries}
        rows = tuple(sorted(self.rows, key=lambda row: row.path))
        return Plan(entries), adapters, Report(rows)
