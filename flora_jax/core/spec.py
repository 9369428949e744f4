"""KernelSpec: how the axes of a kernel map to ``(*batch, in, out)``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import PlanError
from flora_jax.core.paths import BLOCK_NAMES

KINDS = ("dense", "einsum", "conv", "conv_transpose", "embedding", "vector", "other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Which axes of an (unstacked) kernel are batch, input and output.

    Canonical form: ``(B, in, out)``, or ``(in, out)`` without batch axes, where ``in`` and ``out``
    are the products of their axes in the order listed. Stack axes (``nn.scan`` over layers) lead
    the stored array and exist outside the scan only; the axis numbers do not count them.

    Args:
      kind: one of ``dense, einsum, conv, conv_transpose, embedding, vector, other``.
      in_axes, out_axes, batch_axes: axis numbers of the unstacked kernel.
      stack_ndim: leading scan axes of the stored array.
      groups: feature groups of a convolution (``I`` of HWIO is then inputs / groups).

    >>> spec = KernelSpec.conv(spatial=2)
    >>> spec.canonical_shape((3, 3, 64, 128))
    (576, 128)
    """

    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    stack_ndim: int = 0
    groups: int = 1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise PlanError(f"kernel kind {self.kind!r} is not one of {', '.join(KINDS)}")
        axes = sorted(self.batch_axes + self.in_axes + self.out_axes)
        if axes != list(range(len(axes))):
            raise PlanError(
                f"axes {axes} of a {self.kind} kernel must be 0..{len(axes) - 1}, once each"
            )

    @classmethod
    def dense(cls, n_in: int = 1, n_out: int = 1, *, stack_ndim: int = 0) -> KernelSpec:
        """``(*in, *out)``: Linen Dense and DenseGeneral, NNX Linear and LinearGeneral."""
        return cls(
            kind="dense",
            in_axes=tuple(range(n_in)),
            out_axes=tuple(range(n_in, n_in + n_out)),
            stack_ndim=stack_ndim,
        )

    @classmethod
    def conv(
        cls, spatial: int = 2, *, groups: int = 1, transpose: bool = False, stack_ndim: int = 0
    ) -> KernelSpec:
        """``(*spatial, I, O)``: inputs are the window and the channels, output is O."""
        return cls(
            kind="conv_transpose" if transpose else "conv",
            in_axes=tuple(range(spatial + 1)),
            out_axes=(spatial + 1,),
            groups=groups,
            stack_ndim=stack_ndim,
        )

    @classmethod
    def embedding(cls, *, stack_ndim: int = 0) -> KernelSpec:
        """``(vocabulary, features)``."""
        return cls(kind="embedding", in_axes=(0,), out_axes=(1,), stack_ndim=stack_ndim)

    @classmethod
    def einsum(cls, equation: str, *, stack_ndim: int = 0) -> KernelSpec:
        """From ``"x,kernel->y"``; batch axes are kernel letters also in x and y.

        >>> KernelSpec.einsum("BTNH,NHD->BTD").in_axes
        (0, 1)
        >>> KernelSpec.einsum("EBD,EDF->EBF").batch_axes
        (0,)
        """
        lhs, rhs, out = split_equation(equation)
        axes: dict[str, list[int]] = {"batch": [], "in": [], "out": []}
        for axis, letter in enumerate(rhs):
            if letter in lhs:
                axes["batch" if letter in out else "in"].append(axis)
            elif letter in out:
                axes["out"].append(axis)
            else:
                raise PlanError(
                    f"kernel letter {letter!r} of {equation!r} is summed away on its own"
                )
        return cls(
            kind="einsum",
            in_axes=tuple(axes["in"]),
            out_axes=tuple(axes["out"]),
            batch_axes=tuple(axes["batch"]),
            stack_ndim=stack_ndim,
        )

    @classmethod
    def vector(cls, ndim: int = 1, *, stack_ndim: int = 0) -> KernelSpec:
        """A leaf that is not contracted (bias, norm scale): outputs only."""
        return cls(kind="vector", in_axes=(), out_axes=tuple(range(ndim)), stack_ndim=stack_ndim)

    @property
    def ndim(self) -> int:
        """Axes of the unstacked kernel."""
        return len(self.in_axes) + len(self.out_axes) + len(self.batch_axes)

    def unstacked(self) -> KernelSpec:
        """The same spec inside the scan."""
        return dataclasses.replace(self, stack_ndim=0)

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leading scan axes of a stored shape."""
        return tuple(shape[: len(shape) - self.ndim])

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(batch, in, out)`` sizes of an unstacked kernel shape; groups count as batch."""
        prod = lambda axes: math.prod(shape[a] for a in axes)
        out = prod(self.out_axes)
        if out % self.groups:
            raise PlanError(f"{out} output channels do not divide into {self.groups} groups")
        return prod(self.batch_axes) * self.groups, prod(self.in_axes), out // self.groups

    @property
    def batched(self) -> bool:
        """Whether the canonical form has a leading batch axis."""
        return bool(self.batch_axes) or self.groups > 1

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(B, in, out)`` or ``(in, out)`` for an unstacked kernel shape."""
        sizes = self.sizes(shape)
        return sizes if self.batched else sizes[1:]

    def canonical(self, kernel: jax.Array) -> jax.Array:
        """An unstacked kernel in canonical form."""
        batch, n_in, n_out = self.sizes(kernel.shape)
        kernel = jnp.transpose(kernel, self.batch_axes + self.in_axes + self.out_axes)
        if self.groups > 1:
            grouped = kernel.reshape(n_in, self.groups, n_out)
            return jnp.moveaxis(grouped, 1, 0)
        return kernel.reshape((batch, n_in, n_out) if self.batch_axes else (n_in, n_out))

    def restore(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of :meth:`canonical` for a kernel of the given unstacked shape."""
        if self.groups > 1:
            matrix = jnp.moveaxis(matrix, 0, 1)
        order = self.batch_axes + self.in_axes + self.out_axes
        kernel = matrix.reshape(tuple(shape[a] for a in order))
        return jnp.transpose(kernel, tuple(order.index(a) for a in range(len(order))))

    def spatial(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The window of a convolution, ``()`` for other kinds."""
        return tuple(shape[: self.ndim - 2]) if self.kind.startswith("conv") else ()

    def window(self, shape: tuple[int, ...]) -> int:
        """Window size of a convolution (H*W*...), 1 for other kinds."""
        return math.prod(self.spatial(shape))

    def to_json(self) -> dict[str, Any]:
        """A JSON dict; :meth:`from_json` reads it back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelSpec:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


class Stored:
    """What has a stored shape and the spec that cuts it: Entry of a plan, Layout of LIFT."""

    spec: KernelSpec
    shape: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading scan axes of the stored weight."""
        return self.spec.stack_shape(self.shape)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The unstacked shape."""
        return self.shape[len(self.stack) :]


def split_equation(equation: str) -> tuple[str, str, str]:
    """``(x, kernel, y)`` letters of an einsum string; ``...`` may stand for leading axes of x, y.

    Raises:
      PlanError: not of the form ``x,kernel->y``, or a repeated letter.
    """
    try:
        inputs, out = equation.replace(" ", "").split("->")
        lhs, rhs = inputs.split(",")
    except ValueError:
        raise PlanError(f"einsum {equation!r} must read 'x,kernel->y'") from None
    for part in (lhs, rhs, out):
        if len(set(part.replace("...", ""))) != len(part.replace("...", "")):
            raise PlanError(f"einsum {equation!r} repeats a letter in {part!r}")
    if "." in rhs:
        raise PlanError(f"einsum {equation!r}: the kernel's axes must be named")
    return lhs, rhs, out


def infer(path: str, shape: tuple[int, ...]) -> KernelSpec:
    """The spec that a leaf's name, rank and place suggest (Flax names and layouts).

    ``kernel`` of rank 2 is dense, of rank 4 or 5 a 2-D or 3-D convolution (rank 3 may be a 1-D
    convolution or a DenseGeneral: say which); ``embedding`` of rank 2 is an embedding; anything
    else is a vector. Inside a component named like a repeated block
    (``layers`` ...; the scanned form has no index) the first axis is the scan's.

    Raises:
      PlanError: the rank fits no layout; pass ``specs=`` to say what it is.
    """
    parts = path.split("/")
    scanned = any(
        part in BLOCK_NAMES and not (i + 1 < len(parts) and parts[i + 1].isdigit())
        for i, part in enumerate(parts[:-1])
    )
    stack = 1 if scanned else 0
    rank = len(shape) - stack
    if parts[-1] == "kernel":
        if rank == 2:
            return KernelSpec.dense(stack_ndim=stack)
        if rank in (4, 5):
            return KernelSpec.conv(rank - 2, stack_ndim=stack)
        raise PlanError(f"{path}: cannot tell what a kernel of shape {shape} is; pass specs=")
    if parts[-1] == "embedding" and rank == 2:
        return KernelSpec.embedding(stack_ndim=stack)
    return KernelSpec.vector(max(rank, 0), stack_ndim=min(stack, len(shape)))
