"""``low_bit_matmul``: a product with a low-bit weight, through the dispatcher, with gradients."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.core.errors import ConfigError, PlanError, unknown
from flora_jax.kernels import dispatch
from flora_jax.kernels.low_bit_matmul import cuts, reference, tiles, xla
from flora_jax.kernels.low_bit_matmul.blocks import Blocks
from flora_jax.kernels.low_bit_matmul.packing import ROWS, LowBit, Rows, quantize_rows
from flora_jax.kernels.manual_axes import together


def _pallas(module: str, name: str) -> Callable[..., jax.Array]:
    """A function of a kernel's module, imported when first called: Pallas takes a while."""

    def call(*args: Any, **kwargs: Any) -> jax.Array:
        kernel = importlib.import_module(f"flora_jax.kernels.low_bit_matmul.{module}")
        return getattr(kernel, name)(*args, **kwargs)

    return call


FORWARD = {
    "mosaic_gpu": _pallas("mosaic_gpu", "forward"),
    "pallas_tpu": _pallas("pallas_tpu", "forward"),
    "xla": xla.forward,
    "reference": reference.forward,
}
BACKWARD = {
    "mosaic_gpu": _pallas("mosaic_gpu", "dx"),
    "pallas_tpu": _pallas("pallas_tpu", "dx"),
    "xla": xla.dx,
    "reference": reference.dx,
}
# Where XLA is expected to be faster than the kernel that comes before it.
FORWARD_YIELDS = {"mosaic_gpu": cuts.slower}
BACKWARD_YIELDS = {"mosaic_gpu": cuts.slower_dx}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """Everything static of a call."""

    activation: str | None
    x_format: str | None
    dtype: Any
    placement: str | None
    frozen: bool
    blocks: Blocks | None
    implementation: tuple[str, ...] | None


def low_bit_matmul(
    x: jax.Array | Rows,
    w: LowBit,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    x_format: str | None = None,
    dtype: Any = None,
    placement: str | None = None,
    frozen: bool = True,
    blocks: Blocks | None = None,
    implementation: dispatch.Choice = None,
) -> jax.Array:
    """``activation(x w + bias)`` with w of 4 or 8 bits, read packed.

    Sums run in float32; int8 rows: exact int32 within a group. Gradients reach x (``dy w^T``,
    straight through the rounding of rows), bias and, if asked for, ``w.scale``; the gradient of w
    itself is never formed.

    Args:
      x: ``[..., K]`` float32, bfloat16 or float16, or :class:`Rows` quantised before (no gradient).
      w: ``[K, N]``.
      bias: ``[N]``.
      activation: ``relu``, ``silu``, ``gelu`` (tanh form) or None.
      x_format: quantise each row of x first: ``int8`` (with int8 or int4 weights) or
        ``float8_e4m3fn`` (with float8 or int4 weights).
      dtype: of the result; default x's (float32 for Rows).
      placement: of the groups' scales: ``partial`` (on the float32 product of a group) or
        ``weight`` (on the weight, rounded to x's dtype); default: what the implementation prefers.
      frozen: w is a constant. False: ``w.scale`` has a gradient, and x is kept for it.
      blocks: sizes of a Pallas kernel's blocks, :class:`Blocks`; default by its cost model.
      implementation: see :mod:`flora_jax.kernels.dispatch`.

    Returns:
      ``[..., N]``.

    Raises:
      PlanError: shapes or formats that do not fit.
      ConfigError: unknown activation, placement or implementation.
      NotImplementedError: a forced implementation cannot run.

    >>> from flora_jax.kernels.low_bit_matmul import quantize
    >>> low_bit_matmul(jnp.ones((2, 8)), quantize(jnp.ones((8, 3)))).shape
    (2, 3)
    """
    _check(x, w, bias, activation, x_format, placement)
    lead, k = x.shape[:-1], x.shape[-1]
    how = _How(
        activation=activation,
        x_format=x_format,
        dtype=jnp.dtype(dtype or (jnp.float32 if isinstance(x, Rows) else x.dtype)),
        placement=placement,
        frozen=frozen,
        blocks=blocks,
        implementation=dispatch.chosen(implementation),
    )
    if isinstance(x, Rows):
        flat = lambda a: None if a is None else jnp.broadcast_to(a, (*lead, 1)).reshape(-1, 1)
        x = Rows(values=x.values.reshape(-1, k), scale=flat(x.scale), zero=flat(x.zero))
    else:
        x = x.reshape(-1, k)
    x, w, bias = together(x, w, bias)
    return _matmul(how, x, w, bias).reshape(*lead, w.shape[-1])


def _check(x, w, bias, activation, x_format, placement) -> None:
    if len(w.shape) != 2 or x.shape[-1] != w.shape[0]:
        raise PlanError(f"x {x.shape} and a weight {w.shape} do not multiply")
    if bias is not None and bias.shape != w.shape[1:]:
        raise PlanError(f"a bias {bias.shape} for {w.shape[1]} columns")
    if activation is not None and activation not in tiles.ACTIVATIONS:
        raise ConfigError(unknown("activation", activation, tiles.ACTIVATIONS))
    if placement is not None and placement not in tiles.PLACEMENTS:
        raise ConfigError(unknown("placement", placement, tiles.PLACEMENTS))
    if x_format is not None and x_format not in ROWS:
        raise PlanError(unknown("format of rows", x_format, ROWS))
    if isinstance(x, Rows):
        if x_format is not None:
            raise PlanError("x is quantised already: leave x_format out")
        x_format, zero = str(x.values.dtype), x.zero
    else:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise PlanError(f"x has dtype {x.dtype}: floats, or Rows with a scale")
        zero = None
    if x_format is not None:
        _check_rows(x_format, zero, w, placement)


def _check_rows(x_format: str, zero: Any, w: LowBit, placement: str | None) -> None:
    allowed = {"int8": ("int8", "int4"), "float8_e4m3fn": ("float8_e4m3fn", "int4")}
    if w.format not in allowed.get(x_format, ()):
        raise PlanError(f"{x_format} rows do not multiply {w.format} weights")
    if x_format != "int8":
        if zero is not None:
            raise PlanError("float8 rows have no zero point")
        return
    if placement == "weight":
        raise PlanError("int8 rows multiply integers: placement is 'partial'")
    top = (255 if zero is not None else 128) * (255 if w.zero is not None else 128)
    if w.group * top >= 2**31:
        raise PlanError(f"a sum of {w.group} products of int8 overflows int32: smaller groups")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: _How, x: Any, w: LowBit, bias: jax.Array | None) -> jax.Array:
    return _run(how, x, w, bias)


def _run(how: _How, x: Any, w: LowBit, bias: Any, **other: Any) -> jax.Array:
    if how.x_format is not None:
        x = quantize_rows(x, how.x_format)
    given = {n: getattr(how, n) for n in ("activation", "dtype", "placement", "blocks")} | other
    given |= {"implementation": how.implementation, "yields": FORWARD_YIELDS}
    return dispatch.run("low_bit_matmul", FORWARD, x, w, bias, **given)


def _forward(how: _How, x: Any, w: LowBit, bias: Any) -> tuple[jax.Array, Any]:
    if isinstance(x, Rows):
        raise PlanError("Rows have no gradient: give floats and x_format")
    before = None
    if how.activation is None:
        y = _run(how, x, w, bias)
    else:
        # The same float32 numbers that the kernel would have finished, so training sees what
        # serving computes; kept for the backward pass in the result's dtype.
        before = _run(how, x, w, bias, activation=None, dtype=jnp.dtype(jnp.float32))
        y = tiles.activate(before, how.activation).astype(how.dtype)
        before = before.astype(how.dtype)
    like = jnp.zeros((0,), x.dtype)
    return y, (like, None if how.frozen else x, w, bias, before)


def _backward(how: _How, saved: Any, dy: Any) -> tuple[Any, Any, Any]:
    like, x, w, bias, before = saved
    if before is not None:
        wide = before.astype(jnp.float32)
        dy = jax.vjp(lambda z: tiles.activate(z, how.activation), wide)[1](dy.astype(wide.dtype))[0]
    narrow = dy.astype(like.dtype)
    given = {"dtype": like.dtype, "blocks": how.blocks, "implementation": how.implementation}
    dx = dispatch.run("low_bit_matmul dx", BACKWARD, narrow, w, yields=BACKWARD_YIELDS, **given)
    dw = None
    if x is not None:
        if how.x_format is not None:
            rows = quantize_rows(x, how.x_format)
            x = rows.values.astype(jnp.float32) * rows.scale
        dw = dataclasses.replace(
            jax.tree.map(lambda a: None, w), scale=xla.dscale(x, dy, w).astype(w.scale.dtype)
        )
    dbias = None if bias is None else jnp.sum(dy.astype(jnp.float32), 0).astype(bias.dtype)
    return dx, dw, dbias


_matmul.defvjp(_forward, _backward)
