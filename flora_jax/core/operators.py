"""The operator algebra: structured linear maps ``x -> x M`` with ``M [in, out]``.

An adapter returns an expression of these maps; the lazy application and the dense merge are both
derived from it. Row-vector convention throughout: ``(A @ B)`` applies A first, its matrix is
``A.dense() @ B.dense()``. With batch axes every matrix is ``[B, in, out]``.

Three ways to use a map:
  ``apply(inputs)``  first in a layer: contracts the layer's input (tokens, image, ids);
  ``then(y)``        after that: acts on canonical activations ``[..., n]``, any kind of layer;
  ``dense()``        the matrix; only :func:`flora_jax.materialize` and tests form it.
What is known of its rank: ``factors()`` of the map, ``identity_factors()`` of its distance from
``I``; ``core/change.py`` finds those of an adapted weight's change from them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from flora_jax.core.contraction import Contraction, mm
from flora_jax.core.errors import LazyError
from flora_jax.core.leaf import Weight, attend, contract, dense
from flora_jax.core.lowrank import Factors, around, plus, side_by_side, transpose
from flora_jax.core.spec import KernelSpec

Class = TypeVar("Class", bound=type)


def operator(cls: Class) -> Class:
    """Class decorator of maps: a frozen dataclass, compared by identity, that is a pytree.

    Arrays and inner maps are children, so expressions can be vmapped over adapters and gathered
    by rows; fields marked :func:`static` are structure.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of a map's structure (sizes, specs), not of its data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclasses.dataclass(eq=False)
class Inputs:
    """A layer's input: as the layer got it (``raw``) or entered and perhaps mapped since."""

    how: Contraction
    raw: Any = None
    entered: Any = None

    @property
    def z(self) -> Any:
        if self.entered is None:
            self.entered = self.how.enter(self.raw)
        return self.entered

    def map(self, f) -> Inputs:
        """The inputs with ``f`` applied on the channel axis."""
        return Inputs(self.how, None, self.how.map_channels(self.z, f))

    def unfold(self) -> Inputs:
        """The inputs as rows ``[..., in]``: a convolution's become patches."""
        how, rows = self.how.unfold(self.z)
        return self if how is self.how else Inputs(how, None, rows)


class LinearMap:
    """Base class of all maps; see the module docstring.

    ``on_inputs``: as a leading stage it maps the layer's inputs (:meth:`before`), by default their
    channels (:meth:`channels`), and the next stage is the one that contracts them.
    """

    on_inputs = False

    def apply(self, inputs: Inputs) -> jax.Array:
        if not inputs.how.flat:
            kind = inputs.how.spec.kind
            raise LazyError(
                f"{type(self).__name__} has no lazy rule as the first map of a {kind} kernel; "
                "materialize() the weight or choose another adapter for this path"
            )
        return self.then(inputs.z)

    def then(self, y: jax.Array) -> jax.Array:
        raise NotImplementedError

    def channels(self, y: jax.Array) -> jax.Array:
        """What an ``on_inputs`` map does to the channels of a layer's input."""
        return self.then(y)

    def before(self, inputs: Inputs) -> Inputs:
        """What an ``on_inputs`` map makes of a layer's inputs."""
        return inputs.map(self.channels)

    def dense(self) -> jax.Array:
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """``a [.., in, r], b [.., r, out]`` with ``M = a b`` exactly; None if M is not low-rank.

        Found from the map's own parts, never from the matrix; r may exceed min(in, out).
        """
        return None

    def identity_factors(self) -> Factors | None:
        """``a, b`` with ``M = I + a b`` exactly; None if ``M - I`` is not known to be low-rank."""
        return None

    @property
    def T(self) -> LinearMap:
        raise NotImplementedError

    def flops(self) -> int:
        """Multiply-adds times two for one row of input."""
        raise NotImplementedError

    def __add__(self, other: LinearMap) -> Sum:
        return Sum(*terms(self), *terms(other))

    def __sub__(self, other: LinearMap) -> Sum:
        return self + (-1.0) * other

    def __rmul__(self, factor: Any) -> Scale:
        return Scale(factor, self)

    def __matmul__(self, other: LinearMap) -> Compose:
        return Compose(*_stages(self), *_stages(other))


def terms(m: LinearMap) -> tuple[LinearMap, ...]:
    """The terms of a sum; a map alone is its own."""
    return m.terms if isinstance(m, Sum) else (m,)


def _stages(m: LinearMap) -> tuple[LinearMap, ...]:
    return m.stages if isinstance(m, Compose) else (m,)


@operator
class Base(LinearMap):
    """The frozen weight itself, array or low-bit leaf, in its stored layout."""

    weight: Weight
    spec: KernelSpec = static()
    transposed: bool = static(default=False)

    def apply(self, inputs):
        if inputs.raw is not None:
            return inputs.how.enter_out(contract(inputs.how, inputs.raw, self.weight))
        return inputs.how.contract(inputs.z, self.dense())

    def then(self, y):
        if self.transposed and self.spec.kind == "embedding":
            return attend(y, self.weight)
        return mm(y, self.dense())

    def dense(self):
        matrix = self.spec.canonical(dense(self.weight))
        return transpose(matrix) if self.transposed else matrix

    @property
    def T(self):
        return dataclasses.replace(self, transposed=not self.transposed)

    def flops(self):
        return 2 * math.prod(self.spec.canonical_shape(tuple(self.weight.shape)))


@operator
class Identity(LinearMap):
    """``M = I`` of size ``n``."""

    n: int = static()

    def then(self, y):
        return y

    def dense(self):
        return jnp.eye(self.n)

    def identity_factors(self):
        return jnp.zeros((self.n, 0)), jnp.zeros((0, self.n))

    @property
    def T(self):
        return self

    def flops(self):
        return 0


@operator
class Matrix(LinearMap):
    """An explicit matrix ``[in, out]`` or ``[B, in, out]``."""

    matrix: jax.Array

    def apply(self, inputs):
        return inputs.how.contract(inputs.z, self.matrix)

    def then(self, y):
        return mm(y, self.matrix)

    def dense(self):
        return self.matrix

    @property
    def T(self):
        return Matrix(transpose(self.matrix))

    def flops(self):
        return 2 * self.matrix.size


@operator
class LowRank(LinearMap):
    """``M = a b`` with ``a [in, r]``, ``b [r, out]``; a convolution's ``a`` is a convolution."""

    a: jax.Array
    b: jax.Array

    def apply(self, inputs):
        return mm(inputs.how.contract(inputs.z, self.a), self.b)

    def then(self, y):
        return mm(mm(y, self.a), self.b)

    def dense(self):
        return jnp.matmul(self.a, self.b)

    def factors(self):
        return self.a, self.b

    @property
    def T(self):
        return LowRank(transpose(self.b), transpose(self.a))

    def flops(self):
        return 2 * (self.a.size + self.b.size)


@operator
class Scale(LinearMap):
    """``factor * inner``; the factor is a scalar, possibly traced."""

    factor: Any
    inner: LinearMap

    def _times(self, y):
        return y * jnp.asarray(self.factor, y.dtype)

    def apply(self, inputs):
        return self._times(self.inner.apply(inputs))

    def then(self, y):
        return self._times(self.inner.then(y))

    def dense(self):
        return self._times(self.inner.dense())

    def factors(self):
        found = self.inner.factors()
        return None if found is None else (self._times(found[0]), found[1])

    @property
    def T(self):
        return Scale(self.factor, self.inner.T)

    def flops(self):
        return self.inner.flops()


@jax.tree_util.register_pytree_node_class
class Sum(LinearMap):
    """``M = sum of the terms``."""

    def __init__(self, *terms: LinearMap):
        self.terms = terms

    def tree_flatten(self):
        return self.terms, None

    @classmethod
    def tree_unflatten(cls, _, terms):
        return cls(*terms)

    def apply(self, inputs):
        return sum(term.apply(inputs) for term in self.terms)

    def then(self, y):
        return sum(term.then(y) for term in self.terms)

    def dense(self):
        return sum(term.dense() for term in self.terms)

    def factors(self):
        return side_by_side([term.factors() for term in self.terms])

    def identity_factors(self):
        for n, term in enumerate(self.terms):
            own = term.identity_factors()
            if own is not None:
                rest = [other.factors() for other in (*self.terms[:n], *self.terms[n + 1 :])]
                return side_by_side([own, *rest])
        return None

    @property
    def T(self):
        return Sum(*(term.T for term in self.terms))

    def flops(self):
        return sum(term.flops() for term in self.terms)


@jax.tree_util.register_pytree_node_class
class Compose(LinearMap):
    """``M = stages[0] stages[1] ...``: the first stage sees the input first."""

    def __init__(self, *stages: LinearMap):
        self.stages = stages

    def tree_flatten(self):
        return self.stages, None

    @classmethod
    def tree_unflatten(cls, _, stages):
        return cls(*stages)

    def apply(self, inputs):
        stages = list(self.stages)
        while len(stages) > 1 and stages[0].on_inputs:
            inputs = stages.pop(0).before(inputs)
        y = stages[0].apply(inputs)
        for stage in stages[1:]:
            y = stage.then(y)
        return y

    def then(self, y):
        for stage in self.stages:
            y = stage.then(y)
        return y

    def dense(self):
        matrix = self.stages[0].dense()
        for stage in self.stages[1:]:
            matrix = jnp.matmul(matrix, stage.dense())
        return matrix

    def factors(self):
        """The lowest-rank stage's with the others applied; else the product cut at its waist."""
        stages = self.stages
        found = [(n, stage.factors()) for n, stage in enumerate(stages)]
        known = [(n, pair) for n, pair in found if pair is not None]
        if known:
            n, pair = min(known, key=lambda item: item[1][0].shape[-1])
            return around(stages[:n], pair, stages[n + 1 :])
        shapes = [jax.eval_shape(stage.dense).shape for stage in stages]
        width, n = min((shape[-1], n) for n, shape in enumerate(shapes))
        if width >= min(shapes[0][-2], shapes[-1][-1]):
            return None
        batch = max((shape[:-2] for shape in shapes), key=len)
        eye = jnp.broadcast_to(jnp.eye(width), (*batch, width, width))
        return around(stages[: n + 1], (eye, eye), stages[n + 1 :])

    def identity_factors(self):
        """``(I + a1 b1)(I + a2 b2) = I + a1 b1 + a2 b2 + a1 b1 a2 b2``."""
        total = None
        for stage in self.stages:
            own = stage.identity_factors()
            if own is None:
                return None
            total = own if total is None else side_by_side([total, (plus(total, own[0]), own[1])])
        return total

    @property
    def T(self):
        return Compose(*(stage.T for stage in reversed(self.stages)))

    def flops(self):
        return sum(stage.flops() for stage in self.stages)


def delta(expression: LinearMap, base: Base) -> LinearMap:
    """``expression - base``, without applying the base where it is a plain term of a sum."""
    parts = terms(expression)
    if any(part is base for part in parts):
        return Sum(*(part for part in parts if part is not base))
    return Sum(*parts, Scale(-1.0, base))
