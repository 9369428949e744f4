"""Merging into a low-bit base, with what the second rounding costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapted import Adapted
from flora_jax.core.bind import materialize
from flora_jax.core.errors import PlanError
from flora_jax.core.initialize import over_stack
from flora_jax.core.leaf import WeightLeaf, dense, is_leaf
from flora_jax.core.text import columns


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One weight that was merged into low bits; Frobenius norms over the whole leaf.

    Args:
      path: of the weight.
      error: ``|Q(W + dW) - (W + dW)| / |W + dW|``: what rounding the merged weight costs.
      of_change: the same rounding against the adapter's change, ``/ |dW|``; near or above 1 most
        of what was trained may be lost.
      base: ``|W - W_original| / |W_original|``: the error that the base had already, or None.
    """

    path: str
    error: float
    of_change: float
    base: float | None


@dataclasses.dataclass(frozen=True)
class RoundingReport:
    """One row a merged low-bit weight."""

    rows: tuple[Rounding, ...]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Rounding:
        found = {row.path: row for row in self.rows}
        if path not in found:
            near = ", ".join(paths.nearest(path, found))
            raise PlanError(f"the report has no {path!r}; nearest: {near}")
        return found[path]

    def table(self) -> str:
        """Text table: path, rounding error, the same against the change, the base's own error."""
        rows = [("path", "error", "of the change", "base's error")]
        for r in self.rows:
            base = "unknown" if r.base is None else f"{r.base:.4f}"
            rows.append((r.path, f"{r.error:.4f}", f"{r.of_change:.3f}", base))
        return columns(rows)


def requantize(bound: Any, *, original: Any = None) -> tuple[Any, RoundingReport]:
    """``materialize(bound, quantized="requantize")`` and the error of every weight it rounds.

    Args:
      bound: parameters with adapters, some on low-bit leaves.
      original: the parameters before quantisation, if they are at hand.

    Returns:
      ``(merged, report)``: adapted low-bit weights in their own format again, others plain.
    """
    merged = materialize(bound, quantized="requantize")
    after = paths.flatten(merged, is_leaf=is_leaf)
    known = {} if original is None else paths.flatten(original, is_leaf=is_leaf)
    rows = []
    for path, leaf in paths.flatten(bound, is_leaf=is_leaf).items():
        if isinstance(leaf, Adapted) and isinstance(leaf.base, WeightLeaf):
            errors = _errors(leaf, after[path], known.get(path))
            rows.append(Rounding(path, *(None if e is None else float(e) for e in errors)))
    return merged, RoundingReport(tuple(rows))


@jax.jit
def _errors(leaf: Adapted, after: WeightLeaf, original: Any) -> tuple[Any, Any, Any]:
    depth = len(leaf.shape) - leaf.spec.ndim

    def one(leaf, after):
        plain = leaf.dense(jnp.float32)
        base = dense(leaf.base, jnp.float32)
        return plain, dense(after, jnp.float32), base

    plain, rounded, base = over_stack(one, depth)(leaf, after)
    lost, tiny = jnp.linalg.norm(rounded - plain), jnp.finfo(jnp.float32).tiny
    own = None
    if original is not None:
        wide = original.astype(jnp.float32)
        own = jnp.linalg.norm(base - wide) / jnp.maximum(jnp.linalg.norm(wide), tiny)
    change = jnp.linalg.norm(plain - base)
    return (
        lost / jnp.maximum(jnp.linalg.norm(plain), tiny),
        lost / jnp.maximum(change, tiny),
        own,
    )
