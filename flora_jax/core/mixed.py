"""A weight whose rows have adapters of their own: a batch over many adapters in one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.adapted import Bound, Planned, check_rows
from flora_jax.core.contraction import Contraction
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import Prefix, Weight, attend, contract
from flora_jax.core.operators import Base, Inputs, LinearMap, delta, terms
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import Dropout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hole(LinearMap):
    """Stands for the base in an expression that is vmapped, so that it is not repeated."""

    transposed: bool = dataclasses.field(metadata={"static": True})


def _replace_maps(expression: Any, kind: type, f: Callable[[Any], Any]) -> Any:
    hit = lambda node: isinstance(node, kind)
    return jax.tree.map(lambda node: f(node) if hit(node) else node, expression, is_leaf=hit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """K adapters of one configuration and the rows that use them.

    Args:
      bound: arrays with a leading axis K; generated ones ``[K, N, ...]``.
      shift: what they add to the layer's bias, ``[K, *out]``, or None.
      pick: which of the K a row uses, ``[N]``.
      on: whether it uses any, ``[N]``.
    """

    bound: Bound
    shift: jax.Array | None
    pick: jax.Array
    on: jax.Array

    def prefix(self, base: Base, length: int) -> tuple[jax.Array, jax.Array]:
        """The rows' entries ``[N, length, out]``, zeros at the end, and which are there."""
        every = jax.vmap(lambda bound: bound.prefix(base))(self.bound)
        own = every.shape[1]
        every = jnp.pad(every, ((0, 0), (0, length - own), (0, 0)))
        return every[self.pick], self.on[:, None] & (jnp.arange(length) < own)

    def change(
        self,
        base: Base,
        x: jax.Array,
        y: jax.Array,
        run: Callable[[LinearMap, jax.Array], jax.Array],
        how: Contraction | None,
    ) -> jax.Array:
        """What the rows' adapters add to the base output ``y``.

        Expressions are built once per adapter, then gathered: a DoRA's norm or a NOLA's bases are
        found K times, not N times. Where rows have generated arrays each has its own expression.
        """
        additive = []
        stored, pick = self._with_generated(len(x))

        def build(bound: Bound) -> LinearMap:
            expression = bound.expression(base)
            additive.append(any(term is base for term in terms(expression)))
            change = delta(expression, base) if additive[-1] else expression
            return _replace_maps(change, Base, lambda b: _Hole(b.transposed))

        acts = self.bound.acts
        if acts and how is None:
            return jnp.zeros_like(y)
        maps = stored if acts else jax.vmap(build)(stored)
        take = lambda tree, index: jax.tree.map(lambda a: a[index], tree)

        def row(n, map_, shift, x, y):
            if acts:
                return map_.output_change(base, how, y[None])[0]
            fill = lambda hole: dataclasses.replace(base, transposed=hole.transposed)
            awake = lambda d: dataclasses.replace(d, key=jax.random.fold_in(d.key, n))
            map_ = _replace_maps(_replace_maps(map_, _Hole, fill), Dropout, awake)
            z = run(map_, x[None])[0]
            z = z if additive[-1] else z - y
            if shift is None:
                return z
            inner = shift.reshape((1,) * (z.ndim - shift.ndim) + shift.shape)
            return z + inner.astype(z.dtype)

        count = jnp.arange(x.shape[0])
        z = jax.vmap(row)(count, take(maps, pick), take(self.shift, self.pick), x, y)
        on = self.on.reshape(-1, *(1,) * (z.ndim - 1))
        return jnp.where(on, z, jnp.zeros_like(z))

    def _with_generated(self, count: int) -> tuple[Bound, jax.Array]:
        """Adapters without generated arrays and which of them each of ``count`` rows uses."""
        if self.bound.example is None:
            return self.bound, self.pick
        examples = self.bound.example
        generated = jax.tree.leaves(examples)[0].shape[1]
        if generated not in (1, count):
            raise PlanError(f"features of {generated} rows for a batch of {count} rows")
        rows = jnp.arange(count) % generated
        taken = jax.tree.map(lambda a: a[self.pick], dataclasses.replace(self.bound, example=None))
        params = taken.params | jax.tree.map(lambda a: a[self.pick, rows], examples)
        return dataclasses.replace(taken, params=params), jnp.arange(count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixed(Planned):
    """Base weight and, for each row of the batch, an adapter of its own (or none)."""

    base: Weight
    groups: tuple[Group, ...]
    spec: KernelSpec = dataclasses.field(metadata={"static": True})

    def _adapters(self):
        return (group.bound.adapter for group in self.groups)

    def _rows_with_prompt(self):
        return sum(group.on for group in self.groups if group.bound.adapter.virtual_rows()) > 0

    def prefix(self):
        taken = [group for group in self.groups if group.bound.prefixed]
        if not taken:
            return self, None
        rest = tuple(group for group in self.groups if not group.bound.prefixed)
        weight = dataclasses.replace(self, groups=rest) if rest else self.base
        longest = max(group.bound.adapter.tokens for group in taken)
        values, on = 0.0, False
        for group in taken:
            own, has = group.prefix(Base(self.base, self.spec), longest)
            values, on = values + jnp.where(has[..., None], own, 0.0), on | has
        return weight, Prefix(values, on)

    def prefix_tokens(self):
        taken = [group for group in self.groups if group.bound.prefixed]
        if not taken:
            return None
        # Outside a scan the rows' choice is repeated over the layers.
        lengths = sum(jnp.where(group.on, group.bound.adapter.tokens, 0) for group in taken)
        return lengths.reshape(-1, lengths.shape[-1])[0]

    def contract(self, how: Contraction, x: Any) -> jax.Array:
        how = self._prepare(how)
        run = lambda map_, row: how.leave(map_.apply(Inputs(how, row)))
        return self._sum(x, contract(how, x, self.base), run, how)

    def attend(self, x, precision=None):
        self._check_taken()
        run = lambda map_, row: map_.T.then(row)
        return self._sum(x, attend(x, self.base, precision), run, None)

    def _sum(self, x, y, run, how):
        check_rows(self.spec, len(self.groups[0].pick), x)
        base = Base(self.base, self.spec)
        return y + sum(group.change(base, x, y, run, how) for group in self.groups)

    def dense(self, dtype=None):
        raise PlanError("rows have adapters of their own: there is no one merged weight")
