"""What adapters change, weight by weight: exact factors where the method has them, else dW."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core import paths
from flora_jax.core.adapted import Adapted
from flora_jax.core.bind import bind
from flora_jax.core.errors import FloraError, PlanError
from flora_jax.core.initialize import over_stack
from flora_jax.core.leaf import Weight, dense, is_leaf
from flora_jax.core.lowrank import Factors
from flora_jax.core.mixed import Mixed
from flora_jax.core.plan import Entry, Plan
from flora_jax.core.spec import KernelSpec
from flora_jax.core.uses import sibling_bias


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of one weight, and of its layer's bias.

    Args:
      path, spec, shape, dtype: of the weight as stored, stack axes included.
      before, after: the weight leaf, and what binding made of it.
      bias: ``new bias - bias`` in the bias's shape, or None.
    """

    path: str
    spec: KernelSpec
    shape: tuple[int, ...]
    dtype: str
    before: Weight
    after: Any
    bias: jax.Array | None = None

    @property
    def depth(self) -> int:
        """Leading scan axes."""
        return self.spec.stack_ndim

    @property
    def is_kernel(self) -> bool:
        """Whether it is a contracted weight, which can carry a LoRA."""
        return self.spec.kind not in ("vector", "other")

    def factors(self) -> Factors | None:
        """``a [*stack, .., in, r]``, ``b [*stack, .., r, out]`` with ``dW = a b``, or None."""
        if not isinstance(self.after, Adapted):
            return None
        return self._run(lambda after, before: after.change_factors())

    def matrix(self) -> jax.Array:
        """dW ``[*stack, .., in, out]`` in canonical form, float32 or better."""

        def one(after: Any, before: Weight) -> jax.Array:
            if isinstance(after, Adapted):
                return after.change()
            wide = jnp.promote_types(before.dtype, jnp.float32)
            change = jnp.asarray(after, wide) - dense(before).astype(wide)
            return self.spec.unstacked().canonical(change) if self.is_kernel else change

        return self._run(one)

    def _run(self, one: Any) -> Any:
        try:
            return jax.jit(over_stack(one, self.depth))(self.after, self.before)
        except FloraError as error:
            raise type(error)(f"{self.path}: {error}") from None

    def restored(self, matrix: jax.Array) -> jax.Array:
        """``W0 + matrix`` as stored, in the weight's dtype."""
        spec = self.spec.unstacked()
        kernel = self.shape[self.depth :]

        def one(matrix: jax.Array, before: Weight) -> jax.Array:
            change = spec.restore(matrix, kernel) if self.is_kernel else matrix
            return (dense(before).astype(change.dtype) + change).astype(self.dtype)

        return jax.jit(over_stack(one, self.depth))(matrix, self.before)


def changes(
    params: Any,
    adapters: Any,
    plan: Plan | Mapping[str, Plan],
    weights: Any = None,
    example: Any = None,
) -> Iterator[Change]:
    """One :class:`Change` for each adapted weight, in the order of ``params``.

    Arguments as for :func:`flora_jax.bind`: ``dW = sum_i weight_i (W_i - W0)``.

    Raises:
      PlanError: a method that is not one weight for all inputs.
    """
    bound = bind(params, adapters, plan, weights=weights, example=example)
    bound = paths.flatten(bound, is_leaf=is_leaf)
    before = paths.flatten(params, is_leaf=is_leaf)
    entries = planned(plan)
    for path, leaf in before.items():
        if path not in entries:
            continue
        after = bound[path]
        if isinstance(after, Mixed):
            raise PlanError(f"{path}: rows have adapters of their own: there is no one change")
        if isinstance(after, Adapted):
            try:
                after.check_linear()
            except PlanError as error:
                raise PlanError(f"{path}: {error}") from None
        entry, sibling = entries[path], sibling_bias(path)
        bias = None
        if sibling in before and sibling not in entries and bound[sibling] is not before[sibling]:
            bias = (bound[sibling] - before[sibling]).astype(jnp.float32)
        yield Change(path, entry.spec, entry.shape, entry.dtype, leaf, after, bias)


def planned(plan: Plan | Mapping[str, Plan]) -> dict[str, Entry]:
    """``{path: entry}`` of one plan or of the first plan that names the path."""
    plans = [plan] if isinstance(plan, Plan) else list(plan.values())
    return {entry.path: entry for one in reversed(plans) for entry in one}
