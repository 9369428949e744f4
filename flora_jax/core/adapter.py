"""The weight-adapter protocol: hyper-parameters, init and an operator expression."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax

from flora_jax.core.errors import ConfigError, PlanError, unknown
from flora_jax.core.operators import Base, LinearMap
from flora_jax.core.registry import lookup, name_of
from flora_jax.core.spec import KernelSpec

Params = dict[str, jax.Array]
# Frozen random bases must come back bit for bit, whatever jax's default generator is.
PRNG = "threefry2x32"
# A method that only an experiment needs registers as one of its own, beside the package's.
FAMILIES = ("adapter", "experiment")
CONTRACTED = ("dense", "einsum", "conv", "conv_transpose", "embedding")


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operator may look at besides its parameters.

    Args:
      base: the frozen weight as a map; ``base.weight`` is the leaf.
      shape: the unstacked kernel shape.
      dropout: key of this leaf and step while training, else None.
      basis: key of this leaf's frozen random bases (methods with a ``seed``), else None.
      pool: arrays shared by all weights of this configuration (methods with a ``pool``), else None.
    """

    base: Base
    shape: tuple[int, ...]
    dropout: jax.Array | None = None
    basis: jax.Array | None = None
    pool: Params | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Base class of weight adapters: frozen, hashable hyper-parameters with pure methods.

    Class attributes:
      kinds: kernel kinds the method is defined for.
      needs_base: ``init`` reads the weight's values (else it gets a ShapeDtypeStruct).
      statistics: names of the input statistics (:func:`flora_jax.calibrate`) that ``init`` reads;
        it then takes them as a fourth argument ``{name: array}``.
      shared_basis: one random basis for all leaves instead of one per path.
      whole_stack: the method couples the layers of a scanned stack: ``init`` sees the stacked leaf,
        the arrays have whatever axes it gives them, and :meth:`spread` makes each layer's own.
      pooled: :meth:`pool` makes arrays that all weights with this configuration share.
      per_example: :meth:`generate` makes further arrays from each row's own features.
      dim_names: parameter name -> what each axis follows: ``in``, ``out``, ``batch`` or None; a
        last ``kernel`` stands for all axes of the kernel as stored. Shardings follow from it.
    """

    kinds: ClassVar[tuple[str, ...]] = CONTRACTED
    needs_base: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()
    shared_basis: ClassVar[bool] = False
    whole_stack: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    per_example: ClassVar[bool] = False
    dim_names: ClassVar[dict[str, tuple[str | None, ...]]] = {}

    def check(self, spec: KernelSpec, shape: tuple[int, ...]) -> None:
        """Raise PlanError when the method does not fit an unstacked kernel shape."""
        if spec.kind not in self.kinds:
            raise PlanError(
                f"{name_of(self)} takes {', '.join(self.kinds)} weights, this one is {spec.kind}"
            )

    def init(self, key: jax.Array, spec: KernelSpec, base: Any) -> tuple[Params, Params]:
        """``(trained, frozen)`` arrays for one unstacked kernel."""
        raise NotImplementedError

    def finish(self, arrays: Params) -> Params:
        """The arrays of all layers of a stack, for what ``init`` of one layer cannot know."""
        return arrays

    def spread(self, params: Params, spec: KernelSpec, base: Any) -> Params:
        """``{name: [*stack, ...]}``: each layer's own arrays of a ``whole_stack`` method.

        Runs once a step, outside the scan; ``operator``, ``bias`` and ``value`` see its result.

        Args:
          spec: with its stack axes.
          base: shape and dtype of the stacked leaf.
        """
        return params

    def count(self, arrays: Mapping[str, tuple[int, ...]]) -> int:
        """Trained numbers in trained arrays of these shapes, without any that can never move."""
        return sum(math.prod(shape) for shape in arrays.values())

    def operator(self, params: Params, spec: KernelSpec, ctx: Context) -> LinearMap:
        """The adapted weight as an expression of ``ctx.base`` and the parameters."""
        raise NotImplementedError

    def bias(self, params: Params, bias: jax.Array, spec: KernelSpec) -> jax.Array | None:
        """The layer's adapted bias, or None where the method leaves it alone."""
        return None

    def value(self, params: Params) -> jax.Array | None:
        """The whole new leaf, for methods that replace it; None for operators."""
        return None

    def pool(self, key: jax.Array, entries: Sequence[Any]) -> tuple[Params, Params]:
        """``(trained, frozen)`` arrays shared by the weights of ``entries`` (plan entries)."""
        raise NotImplementedError

    def generate(self, pool: Params, features: Any, entries: Sequence[Any]) -> dict[str, Params]:
        """``{path: {name: [*stack, N, ...]}}``: arrays of N rows from the rows' features."""
        raise NotImplementedError

    def virtual_rows(self) -> int:
        """How many rows it adds past the end of an embedding table."""
        return 0

    def rebase(self, base: jax.Array, params: Params, spec: KernelSpec) -> tuple[jax.Array, Params]:
        """Fold frozen parts into the weight: ``(new base, parameters without those parts)``."""
        return base, params

    def to_json(self) -> dict[str, Any]:
        """``{"method": name, field: value ...}`` with every field."""
        return {"method": name_of(self), **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationAdapter(Adapter):
    """Base class of adapters that act on a layer's output, bias included; they do not merge.

    Register them with ``mergeable=False``.
    """

    kinds: ClassVar[tuple[str, ...]] = ("dense", "einsum", "conv", "conv_transpose")

    def operator(self, params: Params, spec: KernelSpec, ctx: Context) -> LinearMap:
        return ctx.base

    def activate(self, params: Params, y: jax.Array, spec: KernelSpec, ctx: Context) -> jax.Array:
        """The new output for the layer's ``y [..., out]`` (``[B, ..., out]`` with batch axes).

        ``out`` counts every output channel; the groups of a convolution lie side by side.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixAdapter(Adapter):
    """Base class of adapters that put entries of their own before an attention's keys or values.

    They sit on the kernel of the key or value projection and leave the weight alone: the attention
    takes them with ``ops.prefix``. A kernel whose prefix nobody took raises when it is used.
    Register them with ``mergeable=False``.

    Args:
      tokens: P, how many entries.
    """

    kinds: ClassVar[tuple[str, ...]] = ("dense", "einsum")

    tokens: int = 20

    def check(self, spec: KernelSpec, shape: tuple[int, ...]) -> None:
        super().check(spec, shape)
        if self.tokens < 1:
            raise PlanError(f"tokens={self.tokens} must be at least 1")
        if spec.batch_axes:
            raise PlanError(f"{name_of(self)} is not defined for kernels with batch axes")

    def operator(self, params: Params, spec: KernelSpec, ctx: Context) -> LinearMap:
        return ctx.base

    def prefix(self, params: Params, spec: KernelSpec, ctx: Context) -> jax.Array:
        """The entries ``[P, out]``, in the layout of the projection's output without its bias."""
        raise NotImplementedError


def output_sizes(spec: KernelSpec, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """``((B,) or (), out)`` of an unstacked kernel: what an :class:`ActivationAdapter` sees."""
    batch = math.prod(shape[a] for a in spec.batch_axes)
    return ((batch,) if spec.batch_axes else ()), math.prod(shape[a] for a in spec.out_axes)


def from_json(data: dict[str, Any]) -> Adapter:
    """The inverse of :meth:`Adapter.to_json`.

    Raises:
      ConfigError: unknown method or field.
    """
    fields = dict(data)
    cls = lookup(FAMILIES, fields.pop("method", "?"))
    known = {f.name for f in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"{cls.__name__}: " + unknown("field", name, known))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def check_rank(rank: int, spec: KernelSpec, shape: tuple[int, ...], name: str = "rank") -> None:
    """Raise PlanError unless ``1 <= rank <= min(in, out)`` of the canonical kernel."""
    _, n_in, n_out = spec.sizes(shape)
    if not 1 <= rank <= min(n_in, n_out):
        raise PlanError(
            f"{name}={rank} is outside 1..{min(n_in, n_out)} of a {n_in}x{n_out} weight"
        )


def check_divides(name: str, size: int, n: int, what: str) -> None:
    """Raise PlanError unless ``size >= 1`` divides ``n``; names the nearest sizes that do."""
    if size >= 1 and n % size == 0:
        return
    below = next((d for d in range(min(size, n), 0, -1) if n % d == 0), 1)
    above = next((d for d in range(max(size, 1), n) if n % d == 0), n)
    near = " or ".join(map(str, sorted({below, above})))
    raise PlanError(f"{name}={size} does not divide {what}={n}; nearest: {near}")


def check_dropout(rate: float, spec: KernelSpec) -> None:
    """Raise PlanError unless a rate fits a branch: ids have no channels to drop."""
    if not 0.0 <= rate < 1.0:
        raise PlanError(f"dropout={rate} is outside [0, 1)")
    if rate > 0.0 and spec.kind == "embedding":
        raise PlanError("an embedding's branch takes no dropout")


def batch_dims(spec: KernelSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(B,)`` for a kernel with batch axes or groups, else ``()``."""
    return spec.canonical_shape(shape)[:-2]
