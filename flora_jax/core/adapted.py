"""A weight with adapters on it, one set for the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import (
    PRNG,
    ActivationAdapter,
    Adapter,
    Context,
    Params,
    PrefixAdapter,
    output_sizes,
)
from flora_jax.core.change import delta_factors
from flora_jax.core.contraction import Contraction, over_batch
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import Prefix, Weight, WeightLeaf, contract
from flora_jax.core.lowrank import Factors, side_by_side
from flora_jax.core.operators import Base, Inputs, LinearMap, Scale, Sum, delta, terms
from flora_jax.core.registry import method_of, name_of
from flora_jax.core.spec import KernelSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bound:
    """One adapter's arrays at one weight; keys are raw threefry data, which scan can slice.

    Args:
      pool: what the weights of its configuration share, repeated over the stack.
      example: arrays ``[N, ...]`` generated from the features of N rows; one row's serve any batch.
      bias: the layer's bias, for adapters of the layer's output.
    """

    params: Params
    dropout: jax.Array | None
    basis: jax.Array | None
    weight: jax.Array | None
    pool: Params | None
    example: Params | None
    bias: jax.Array | None
    adapter: Adapter = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        """How many rows there are generated arrays for; 0 without any (in an unstacked leaf)."""
        return len(jax.tree.leaves(self.example)[0]) if self.example else 0

    def for_row(self, n: jax.Array, example: Params | None) -> Bound:
        """The adapter as row n has it: its generated arrays, a dropout mask of its own."""
        dropout = self.dropout
        if dropout is not None:
            key = jax.random.wrap_key_data(dropout, impl=PRNG)
            dropout = jax.random.key_data(jax.random.fold_in(key, n))
        params = {**self.params, **(example or {})}
        return dataclasses.replace(self, params=params, dropout=dropout, example=None)

    def context(self, base: Base) -> Context:
        """What the operator may look at."""
        wrap = lambda data: None if data is None else jax.random.wrap_key_data(data, impl=PRNG)
        shape = tuple(base.weight.shape)
        return Context(base, shape, wrap(self.dropout), wrap(self.basis), self.pool)

    def expression(self, base: Base) -> LinearMap:
        """The adapted weight as an expression."""
        return self.adapter.operator(self.params, base.spec, self.context(base))

    @property
    def prefixed(self) -> bool:
        """Whether it gives the attention entries of its own."""
        return isinstance(self.adapter, PrefixAdapter)

    def prefix(self, base: Base) -> jax.Array:
        """Those entries, ``[P, out]``."""
        return self.adapter.prefix(self.params, base.spec, self.context(base))

    @property
    def acts(self) -> bool:
        """Whether it changes the layer's output instead of the weight."""
        return isinstance(self.adapter, ActivationAdapter)

    def output_change(self, base: Base, how: Contraction, y: jax.Array) -> jax.Array:
        """What an adapter of the output adds to it; ``y`` is the output without its bias."""
        before = how.channels(y)
        if self.bias is not None:
            # The layer adds the bias to what comes out here, so it may not be in the result.
            batch, n_out = output_sizes(base.spec, tuple(base.weight.shape))
            before = before + over_batch(self.bias.reshape(*batch, n_out), before)
        after = self.adapter.activate(self.params, before, base.spec, self.context(base))
        change = (after - before).astype(y.dtype)
        if self.weight is not None:
            change = change * self.weight.astype(y.dtype)
        return how.from_channels(change)


class Planned(WeightLeaf):
    """What leaves with adapters share: a base and the layout it was planned with."""

    base: Weight
    spec: KernelSpec

    @property
    def shape(self):
        return tuple(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    def _adapters(self) -> Iterable[Adapter]:
        """Every adapter on it."""
        raise NotImplementedError

    def _prepare(self, how: Contraction) -> Contraction:
        """The contraction, checked against the plan; adapters may add rows to an embedding."""
        self._check(how)
        if any(adapter.virtual_rows() for adapter in self._adapters()):
            return dataclasses.replace(how, virtual=True)
        return how

    def _check_taken(self) -> None:
        for adapter in self._adapters():
            if isinstance(adapter, PrefixAdapter):
                raise PlanError(
                    f"the {name_of(adapter)} entries of a weight of shape {self.shape} were not "
                    "taken by the attention (ops.prefix): the key and value projections of "
                    "flora_jax.models take them, other layers have to be taught to"
                )

    def virtual_rows(self):
        counts = {adapter.virtual_rows() for adapter in self._adapters()} - {0}
        if len(counts) > 1:
            raise PlanError(f"prompts of different lengths at one table: {sorted(counts)} tokens")
        return (counts.pop(), self._rows_with_prompt()) if counts else None

    def _rows_with_prompt(self) -> jax.Array | None:
        return None

    def _check(self, how: Contraction) -> None:
        self._check_taken()
        ours, theirs = self.spec, how.spec
        same = (ours.batch_axes, ours.in_axes, ours.out_axes, ours.groups)
        if same != (theirs.batch_axes, theirs.in_axes, theirs.out_axes, theirs.groups):
            raise PlanError(
                f"a weight of shape {self.shape} was planned as {ours} and is used as {theirs}; "
                "pass specs= to flora.plan"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Planned):
    """Base weight and the adapters on it; a pytree whose first leaf is the base."""

    base: Weight
    bound: tuple[Bound, ...]
    spec: KernelSpec = dataclasses.field(metadata={"static": True})

    def operator(self) -> LinearMap:
        """The expression of the (unstacked) adapted weight."""
        base = Base(self.base, self.spec)
        linear = [bound for bound in self.bound if not bound.acts]
        if not linear:
            return base
        if len(linear) == 1 and linear[0].weight is None:
            return linear[0].expression(base)
        parts: list[LinearMap] = [base]
        for bound in linear:
            change = delta(bound.expression(base), base)
            parts.append(change if bound.weight is None else Scale(bound.weight, change))
        return Sum(*parts)

    def _adapters(self):
        return (bound.adapter for bound in self.bound)

    def prefix(self):
        taken = [bound for bound in self.bound if bound.prefixed]
        if not taken:
            return self, None
        rest = tuple(bound for bound in self.bound if not bound.prefixed)
        weight = dataclasses.replace(self, bound=rest) if rest else self.base
        return weight, Prefix(taken[0].prefix(Base(self.base, self.spec))[None], None)

    def prefix_tokens(self):
        return next((bound.adapter.tokens for bound in self.bound if bound.prefixed), None)

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        how = self._prepare(how)
        count = self._rows
        if count > 1:
            return self._by_rows(count, x, lambda leaf, row: leaf.contract(how, row))
        if count == 1:
            return self._for_all().contract(how, x)
        y = how.leave(self.operator().apply(Inputs(how, x)))
        acting = [bound for bound in self.bound if bound.acts]
        if not acting:
            return y
        # Changes add up, whatever their order: each is found on the base's own output.
        base = Base(self.base, self.spec)
        plain = y if len(acting) == len(self.bound) else contract(how, x, self.base)
        return y + sum(bound.output_change(base, how, plain) for bound in acting)

    def attend(self, x, precision=None):
        self._check_taken()
        count = self._rows
        if count > 1:
            return self._by_rows(count, x, lambda leaf, row: leaf.attend(row))
        if count == 1:
            return self._for_all().attend(x)
        return self.operator().T.then(x)

    @property
    def _rows(self) -> int:
        """How many rows have weights of their own; 0 if all rows share one."""
        return max(bound.count for bound in self.bound)

    def _for_all(self) -> Adapted:
        """The weight generated from the features of one row, for any batch."""
        first = lambda b: None if b.example is None else jax.tree.map(lambda a: a[0], b.example)
        bound = (
            dataclasses.replace(b, params={**b.params, **(first(b) or {})}, example=None)
            for b in self.bound
        )
        return dataclasses.replace(self, bound=tuple(bound))

    def _by_rows(
        self, count: int, x: jax.Array, run: Callable[[Adapted, jax.Array], jax.Array]
    ) -> jax.Array:
        """``run`` on each row with the arrays that were generated for it."""
        check_rows(self.spec, count, x)
        examples = tuple(bound.example for bound in self.bound)

        def one(n, examples, x):
            bound = tuple(b.for_row(n, e) for b, e in zip(self.bound, examples))
            return run(dataclasses.replace(self, bound=bound), x[None])[0]

        return jax.vmap(one)(jnp.arange(count), examples, x)

    def check_linear(self) -> None:
        """Raise PlanError unless the adapted weight is one weight, whatever the input."""
        for bound in self.bound:
            if bound.count > 1:
                raise PlanError(
                    f"{name_of(bound.adapter)} gives each of {bound.count} rows a weight of its "
                    "own; bind(example=) the features of one row to merge for it"
                )
            if not method_of(bound.adapter).mergeable:
                raise PlanError(
                    f"{name_of(bound.adapter)} is no change of the weight and does not merge; keep "
                    "the base and the adapters beside each other"
                )

    def dense(self, dtype=None):
        self.check_linear()
        matrix = self._for_all().operator().dense()
        return self.spec.restore(matrix, self.shape).astype(dtype or self.dtype)

    def change(self) -> jax.Array:
        """``W - W0`` in canonical form ``[.., in, out]``, float32 or better, as one matrix."""
        self.check_linear()
        base = Base(self.base, self.spec)
        change = delta(self._for_all().operator(), base)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        zero = jnp.zeros(self.spec.canonical_shape(self.shape), wide)
        return sum((term.dense().astype(wide) for term in terms(change)), zero)

    def change_factors(self) -> Factors | None:
        """``a, b`` with ``W - W0 = a b`` exactly, or None where the maps do not tell."""
        self.check_linear()
        base = Base(self.base, self.spec)
        parts = []
        for bound in self._for_all().bound:
            found = delta_factors(bound.expression(base), base)
            if found is not None and bound.weight is not None:
                found = (found[0] * bound.weight, found[1])
            parts.append(found)
        return side_by_side(parts)


def check_rows(spec: KernelSpec, count: int, x: jax.Array) -> None:
    """Raise PlanError unless a layer's input has one row for each of ``count`` adapters."""
    if spec.batched and spec.kind == "einsum":
        raise PlanError("rows cannot have adapters of their own on a kernel with batch axes")
    if x.ndim == 0 or x.shape[0] != count:
        raise PlanError(f"adapters for {count} rows, a layer's input has shape {x.shape}")
