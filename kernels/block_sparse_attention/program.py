"""What the Hopper kernels of this op share: programs, where they find their rows, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import costs, hopper
from flora_jax.kernels.block_sparse_attention import tile
from flora_jax.kernels.block_sparse_attention.layout import Shape


def readers(block: int) -> tuple[int, int]:
    """How many warpgroups share a block's rows, and how many rows each has."""
    return block // 64, 64


def row_values(rows: int, *values: float) -> list[Array]:
    """A number per row of a tile in registers, for each of the values."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    return [plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), layout) for x in values]


def load(ref: Any, axis: int) -> Array:
    """Numbers per query from shared memory, for a tile that loses ``axis``."""
    return hopper.load(ref, plgpu.Layout.WGMMA.reduce(axis))


def product(x: Any, y: Any, shape: tuple[int, int], transpose: bool = False) -> Array:
    """``x y`` or ``x y^T`` of tiles in shared memory."""

    def body(acc: Any) -> Array:
        plgpu.wgmma(acc, x, plgpu.transpose_ref(y, (1, 0)) if transpose else y)
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def add_product(total: Array, x: Array, y: Any) -> Array:
    """``total + x y``; x in registers, y in shared memory."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, x, y))(plgpu.ACC.init(total))


def scores(shape: Shape, s: Array, block: Any) -> Array:
    """Base-2 scores ``[rows, block_k]`` of products; keys past the end count for nothing."""
    s = s * (shape.scale * tile.LOG2E)
    if shape.keys % shape.block_k == 0:
        return s
    index = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(block * shape.block_k + index < shape.keys, s, tile.MASKED)


def kernel(
    shape: Shape, body: Any, types: Any, scratch: Any, blocks: int, heads: int, warpgroups: int,
    *, products: int = 0, tokens: int, numbers: int = 0,
) -> Any:  # fmt: skip
    """The kernel over ``blocks`` of each of ``heads``.

    Args:
      products: of every listed pair of blocks.
      tokens: rows of a head, of 16 bits, that all programs copy; of 32 bits they count twice.
      numbers: of 32 bits, one per token, that they copy.
    """
    grid = {"block": blocks, "head": heads, "batch": shape.batch}
    pair = 2 * shape.block_q * shape.block_k * shape.width
    work = costs.Work(
        flops=products * shape.pairs * pair, bytes=2 * tokens * shape.width + 4 * numbers
    )
    return hopper.kernel(body, types, scratch, grid, warpgroups, work=work)


def place() -> tuple[Any, ...]:
    return tuple(lax.axis_index(name) for name in ("batch", "head", "block", "wg"))


def split(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder."""
    by = jnp.array(by, number.dtype)
    return lax.div(number, by), lax.rem(number, by)


def queries(batch: Any, head: Any, start: Any, size: int) -> tuple[Any, Any]:
    """Where queries of a head lie, and numbers per query."""
    return (batch, pl.ds(start, size), head), (batch, head, pl.ds(start, size))


def like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def row_type(shape: Shape) -> jax.ShapeDtypeStruct:
    tokens = shape.query_blocks * shape.block_q
    return jax.ShapeDtypeStruct((shape.batch, shape.heads, tokens), jnp.float32)


def listed(
    shape: Shape, batch: Any, head: Any, block: Any, table: Any, *arrays: Any
) -> Callable[[Any], Sequence[Any]]:
    """The blocks of ``arrays``, keys and values, that a row of the table lists at step t."""

    def sources(t: Any) -> Sequence[Any]:
        start = table[batch, head, block, t] * shape.block_k
        at = batch, pl.ds(start, shape.block_k), split(head, shape.repeats)[0]
        return [x.at[at] for x in arrays]

    return sources
