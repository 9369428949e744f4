"""Shapes of the op: checks, blocks and heads, and the table read by key block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Blocks that a step takes; None: by the cost model.

    Args:
      keys: listed key blocks, in the TPU kernels of the output and of the queries' gradient.
      queries: query blocks, in the kernels of the keys' gradient (on Hopper of a program, whose
        default is fixed); in the XLA form at most so many, a divisor of their number.

    Raises:
      ConfigError: less than 1.
    """

    keys: int | None = None
    queries: int | None = None

    def __post_init__(self):
        for name, blocks in dataclasses.asdict(self).items():
            if blocks is not None and blocks < 1:
                raise ConfigError(f"Steps({name}={blocks}): at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static sizes of one call, named as in ``block_sparse_attention``."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    block_q: int
    block_k: int
    entries: int
    scale: float
    steps: Steps = Steps()

    @property
    def repeats(self) -> int:
        """Query heads per key head."""
        return self.heads // self.key_heads

    @property
    def query_blocks(self) -> int:
        """ceil(T / block_q)."""
        return -(-self.queries // self.block_q)

    @property
    def rows(self) -> int:
        """Queries of all heads, in whole blocks."""
        return self.batch * self.heads * self.query_blocks * self.block_q

    @property
    def pairs(self) -> int:
        """Blocks that the table lists."""
        return self.batch * self.heads * self.query_blocks * self.entries

    @property
    def key_blocks(self) -> int:
        """ceil(S / block_k)."""
        return -(-self.keys // self.block_k)


def shape_of(
    q: Array,
    k: Array,
    v: Array,
    table: Array,
    block_q: int,
    block_k: int,
    scale: float | None,
    steps: Steps | None = None,
) -> Shape:
    """The sizes of a call.

    Raises:
      ConfigError: shapes or dtypes do not fit each other; names them.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ConfigError(
            f"q [B,T,N,H] and k, v [B,S,K,H] expected; q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"q {q.shape} and k {k.shape}: equal widths, and key heads that divide query heads"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ConfigError(f"one floating dtype for q, k, v; {q.dtype}, {k.dtype}, {v.dtype}")
    if block_q < 1 or block_k < 1:
        raise ConfigError(f"block_q={block_q}, block_k={block_k}: at least 1")
    shape = Shape(
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2],
        key_heads=k.shape[2],
        width=q.shape[3],
        block_q=block_q,
        block_k=block_k,
        entries=table.shape[-1],
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        steps=steps or Steps(),
    )
    expected = (shape.batch, shape.heads, shape.query_blocks)
    if table.ndim != 4 or table.shape[:3] != expected or table.shape[3] < 1:
        raise ConfigError(f"table {table.shape}: {(*expected, 'K')} expected, K at least 1")
    if table.dtype != jnp.int32:
        raise ConfigError(f"table is {table.dtype}; int32 expected")
    return shape


def by_head(x: Array, block: int) -> Array:
    """``[B, T, N, H] -> [B, N, T', H]``, zeros up to ``T'``, a multiple of ``block``."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def by_token(x: Array, tokens: int) -> Array:
    """The inverse of ``by_head``."""
    return jnp.swapaxes(x[:, :, :tokens], 1, 2)


def rows_by_head(x: Array, block: int) -> Array:
    """``[B, T, N] -> [B, N, T']``, zeros up to ``T'``, a multiple of ``block``."""
    return by_head(x[..., None], block)[..., 0]


def row_terms(o: Array, do: Array, dlse: Array) -> Array:
    """What each row subtracts from dP, ``rowsum(o * do) - dlse``, ``[B, T, N]`` float32."""
    return jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse


def segments(table: Array, key_blocks: int, length: int) -> tuple[Array, Array, Array]:
    """The table read by key block, in pieces of equal length, in a shape that no value changes.

    A key block that many query blocks list is cut into several segments; one that none lists gets
    an empty one. So work is spread evenly whatever the table says.

    Args:
      table: int32 ``[P]``, the key block of each (query block, entry) pair.
      key_blocks: number of key blocks ``N_k``.
      length: pairs per segment.

    Returns:
      ``(column, pairs, count)``: int32 ``[G]`` the key block of each of
      ``G = ceil(P / length) + N_k`` segments, ascending; int32 ``[G, length]`` indices into
      ``table``; int32 ``[G]`` how many of them are real. Segments past the last real one are empty
      and belong to the last key block.
    """
    total = table.shape[0]
    size = -(-total // length) + key_blocks
    order = jnp.argsort(table, stable=True).astype(jnp.int32)
    listed = jnp.zeros(key_blocks, jnp.int32).at[table].add(1)
    needed = jnp.maximum(-(-listed // length), 1)
    end = jnp.cumsum(needed)
    start, first = end - needed, jnp.cumsum(listed) - listed
    block = table[order]
    rank = jnp.arange(total, dtype=jnp.int32) - first[block]
    pairs = jnp.zeros((size, length), jnp.int32)
    pairs = pairs.at[start[block] + rank // length, rank % length].set(order)
    index = jnp.arange(size, dtype=jnp.int32)
    column = jnp.searchsorted(end, index, side="right").astype(jnp.int32)
    column = jnp.minimum(column, key_blocks - 1)
    count = jnp.clip(listed[column] - (index - start[column]) * length, 0, length)
    return column, pairs, count.astype(jnp.int32)


def fold_queries(shape: Shape, x: Array) -> Array:
    """``[B, T, N(, H)] -> [B * K, R * T'(, H)]``: the queries of all heads that read one key head.

    Query block ``i`` of the ``r``-th query head becomes block ``r * N_q + i``.
    """
    rows = x.ndim == 3
    x = rows_by_head(x, shape.block_q) if rows else by_head(x, shape.block_q)
    return x.reshape(shape.batch * shape.key_heads, -1, *x.shape[3:])


def unfold_queries(shape: Shape, x: Array) -> Array:
    """The inverse of ``fold_queries``."""
    x = x.reshape(shape.batch, shape.heads, -1, *x.shape[2:])
    return jnp.swapaxes(x[:, :, : shape.queries], 1, 2)


def fold_table(shape: Shape, table: Array) -> Array:
    """``[B, N, N_q, n] -> [B * K, R * N_q, n]``, rows as ``fold_queries`` has the blocks."""
    return table.reshape(shape.batch * shape.key_heads, -1, shape.entries)


def product(spec: str, x: Array, y: Array) -> Array:
    """``einsum`` with a float32 result: exact products of float32, float32 sums of bfloat16.

    A CPU's compiler has no such product of bfloat16 in every layout, and makes float32 of the
    factors where it has one: here they are float32 from the start.
    """
    if dispatch.platform() == "other" and jax.default_backend() == "cpu":
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=exact, preferred_element_type=jnp.float32)
