"""Pallas for TPU: a grid step takes a block of queries with its keys and the few before it.

All keys of a query are in one tile, so nothing is kept of the forward pass but its arguments.
Scores lie ``[keys, queries]``: numbers per query are rows, and no reduction crosses lanes. The
gradient walks the blocks from the last to the first and carries what queries add to the keys before
their block.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import costs, dispatch
from flora_jax.kernels.heads import Heads
from flora_jax.kernels.manual_axes import results
from flora_jax.kernels.window_attention.reference import Marks
from flora_jax.kernels.window_attention.tiles import TILE, Tiles

BLOCKS = (128, 256, 512, 1024)
"""Queries of a grid step, which is a program of its tiles one after another."""
SOFTMAX = 12
"""Element-wise operations per score, about."""
WIDEST = 513
VMEM = 96 * 2**20
"""Bytes of VMEM that one kernel may ask for."""


def pallas_tpu(
    q: Array,
    k: Array,
    v: Array,
    marks: Marks,
    *,
    window: int,
    scale: float,
    block: int | None = None,
) -> tuple[Array, Array, Array]:
    """The results of the op.

    Args:
      block: queries of a grid step; default by a cost model (``kernels/costs.py``).

    Raises:
      NotImplementedError: keys before the first query, a window of more than 513 keys, dtypes
        other than float32 and bfloat16, or heads so large that a step does not fit the VMEM.
    """
    batch, length, heads, dim = q.shape
    key_heads = k.shape[2]
    if k.shape[1] != length:
        raise NotImplementedError("keys before the first query")
    if window > WIDEST:
        raise NotImplementedError(f"a window of {window} keys; {WIDEST} fit")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"dtype {q.dtype}")
    halo = power(window - 1, 16)
    least, most = max(halo, TILE), max(halo, power(length, TILE))
    how = How(
        tiles=Tiles(window=window, halo=halo, group=heads // key_heads, scale=scale),
        batch=batch, length=length, key_heads=key_heads, dim=dim, value_dim=v.shape[3],
        block=least, marked=marks is not None,
    )  # fmt: skip
    candidates = [n for n in BLOCKS if least <= n <= most] if block is None else [block]
    block = costs.cheapest(
        candidates,
        refusal=lambda block: dataclasses.replace(how, block=block).refusal(),
        seconds=lambda block: dataclasses.replace(how, block=block).seconds(q.dtype),
        what=f"block of queries for a window of {window}",
    )
    return _attend(dataclasses.replace(how, block=block), q, k, v, marks)


def power(n: int, least: int) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return 1 << (max(n, least) - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """What is static of one call; ``marked``: there are segments or places without keys."""

    tiles: Tiles
    batch: int
    length: int
    key_heads: int
    dim: int
    value_dim: int
    block: int
    marked: bool

    def heads(self, width: int, repeats: int = 1, block: int = 0) -> Heads:
        return Heads(
            batch=self.batch, tokens=self.length, key_heads=self.key_heads, repeats=repeats,
            width=width, block=block or self.block,
        )  # fmt: skip

    @property
    def queries(self) -> Heads:
        return self.heads(self.dim, self.tiles.group)

    @property
    def outputs(self) -> Heads:
        return self.heads(self.value_dim, self.tiles.group)

    @property
    def keys(self) -> Heads:
        return self.heads(self.dim)

    @property
    def values(self) -> Heads:
        return self.heads(self.value_dim)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.key_heads, self.queries.count

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of a number per query and head."""
        padded = self.queries.count * self.block
        return self.batch, self.key_heads, self.tiles.group, padded

    @property
    def flops(self) -> int:
        """Of the two products of the forward pass."""
        queries = self.batch * self.key_heads * self.tiles.group * self.queries.count * self.block
        return 2 * queries * (self.tiles.halo + TILE) * (self.dim + self.value_dim)

    def step_bytes(self) -> int:
        """VMEM of a step of the backward kernel, roughly: blocks twice, sums, and a tile."""
        lanes = lambda n: -(-n // 128) * 128
        group, halo = self.tiles.group, self.tiles.halo
        wide = lanes(self.dim) + lanes(self.value_dim)
        blocks = 2 * self.block * (group * 3 + 4) * wide + 2 * halo * wide
        sums = 2 * (self.block + halo) * wide
        return 4 * (blocks + sums + 6 * (TILE + halo) * group * TILE)

    def refusal(self) -> str | None:
        """Why the kernels cannot take this block, or None."""
        least = max(self.tiles.halo, TILE)
        if self.block % least:
            return f"a block of {self.block} is no multiple of {least}"
        need = self.step_bytes()
        if need > VMEM:
            return f"a step of {self.block} needs {need >> 20} MiB of VMEM of {VMEM >> 20}"
        return None

    def seconds(self, dtype: Any) -> float:
        """An estimate that orders blocks: longer ones make fewer steps and read fewer keys twice,
        and have more of their last behind the end."""
        steps = math.prod(self.grid)
        rows = self.tiles.group * self.block + self.block + self.tiles.halo
        moved = steps * rows * (self.dim + self.value_dim) * jnp.dtype(dtype).itemsize
        scores = steps * self.tiles.group * self.block * (self.tiles.halo + TILE)
        work = costs.Work(flops=self.flops, bytes=moved)
        return costs.TPU.seconds(work, SOFTMAX * scores, steps)

    def split_rows(self, x: Array) -> Array:
        """From ``[B, T, N]``."""
        x = jnp.pad(x, ((0, 0), (0, self.rows[3] - self.length), (0, 0)))
        return x.transpose(0, 2, 1).reshape(self.rows)

    def join_rows(self, x: Array) -> Array:
        return x.reshape(self.batch, -1, self.rows[3]).transpose(0, 2, 1)[:, : self.length]

    def inputs(self, at: Any, q: Array, k: Array, v: Array, marks: Marks) -> list[Any]:
        """Arrays and their blocks; ``at`` maps a step of the grid to a block."""
        place = lambda b, h, c: (b, h, at(c))
        ratio = self.block // self.tiles.halo
        before = lambda b, h, c: (b, h, jnp.maximum(at(c) * ratio - 1, 0))
        keys, values = self.keys.split(k), self.values.split(v)
        found = [
            (self.queries.split(q), self.queries.group(place)),
            (keys, self.keys.group(place)),
            (values, self.values.group(place)),
            (keys, self.heads(self.dim, block=self.tiles.halo).group(before)),
            (values, self.heads(self.value_dim, block=self.tiles.halo).group(before)),
        ]
        if not self.marked:
            return found
        for x, many in zip(self._by_block(marks), (self.block, self.tiles.halo + self.block)):
            spec = pl.BlockSpec((None, None, 1, many), lambda b, h, c: (b, at(c), 0, 0))
            found.append((x, spec))
        return found

    def _by_block(self, marks: Marks) -> tuple[Array, Array]:
        """Marks of every block's queries ``[B, n, 1, C]`` and keys, ``[B, n, 1, halo + C]``."""
        behind = self.queries.count * self.block - self.length
        mine, theirs = (jnp.pad(x, ((0, 0), (0, behind))) for x in marks)
        cut = lambda x: x.reshape(self.batch, -1, 1, self.block)
        mine, theirs = cut(mine), cut(theirs)
        before = jnp.pad(
            theirs[:, :-1, :, self.block - self.tiles.halo :], ((0, 0), (1, 0), (0, 0), (0, 0))
        )
        return mine, jnp.concatenate([before, theirs], axis=3)

    def row_spec(self, at: Any) -> pl.BlockSpec:
        block = None, None, self.tiles.group, self.block
        return pl.BlockSpec(block, lambda b, h, c: (b, h, 0, at(c)))

    def read(self, c: Any, refs: tuple[Any, ...]) -> tuple[Any, ...]:
        """``q [G, C, D]``, ``k, v [halo + C, D]`` and a step's marks."""
        q, k, v, k_before, v_before, *marks = refs
        whole = lambda heads, ref: heads.read(ref, c).astype(ref.dtype)
        halo = (
            self.heads(self.dim, block=self.tiles.halo),
            self.heads(self.value_dim, block=self.tiles.halo),
        )
        # What lies before a block is never behind the end, so that its number does not matter.
        early = [
            heads.read(ref, 0).astype(ref.dtype)[0]
            for heads, ref in zip(halo, (k_before, v_before))
        ]
        k = jnp.concatenate([early[0], whole(self.keys, k)[0]])
        v = jnp.concatenate([early[1], whole(self.values, v)[0]])
        return whole(self.queries, q), k, v, tuple(ref[...] for ref in marks)


def call(
    body: Any,
    how: How,
    order: str,
    inputs: list[Any],
    outputs: list[Any],
    scratch: Any,
    flops: int,
) -> list[Array]:
    """A kernel over ``(batch, key head, block)``; outputs are ``(shape, dtype, spec)``."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    blocks = [(x.dtype, spec) for x, spec in inputs] + [(dtype, spec) for _, dtype, spec in outputs]
    each = sum(
        jnp.dtype(dtype).itemsize * math.prod(size or 1 for size in spec.block_shape)
        for dtype, spec in blocks
    )
    moved = each * math.prod(how.grid)
    return pl.pallas_call(
        body,
        grid=how.grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=results(shapes, [x for x, _ in inputs]),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", order), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=dispatch.interpret_mode(),
    )(*[x for x, _ in inputs])


def _forward_body(how: How, *refs: Any) -> None:
    *refs, o_ref, lse_ref, top_ref = refs
    c = pl.program_id(2)
    q, k, v, marks = how.read(c, refs)
    parts = []
    for at in range(0, how.block, TILE):
        tile = how.tiles.cut(at, q, k, v, marks, c * how.block)
        o, lse, top = how.tiles.forward(*tile)
        parts.append(o)
        lse_ref[:, at : at + TILE], top_ref[:, at : at + TILE] = lse, top
    how.outputs.write(o_ref, jnp.concatenate(parts, axis=1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, marks):
    at = lambda c: c
    rows = (how.rows, jnp.float32, how.row_spec(at))
    o, lse, top = call(
        partial(_forward_body, how),
        how,
        "parallel",
        how.inputs(at, q, k, v, marks),
        [(how.outputs.shape, q.dtype, how.outputs.group(lambda *step: step)), rows, rows],
        [],
        how.flops,
    )
    return how.outputs.join(o), how.join_rows(lse), how.join_rows(top)


def _attend_forward(how, q, k, v, marks):
    return _attend(how, q, k, v, marks), (q, k, v, marks)


def start_block(how: How, *sums: Any) -> None:
    """Sums over a block's keys and those before it, ``[halo + C, D]``: the last keys keep what
    later queries gave them, when a grid walks the blocks from the last to the first."""
    block, halo = how.block, how.tiles.halo

    @pl.when(pl.program_id(2) == 0)
    def _():
        for total in sums:
            total[:halo] = jnp.zeros((halo, total.shape[1]), jnp.float32)

    for total in sums:
        late = total[:halo]
        total[:block] = jnp.zeros((block, total.shape[1]), jnp.float32)
        total[block:] = late


def _backward_body(how: How, *refs: Any) -> None:
    *refs, do_ref, dlse_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
    block, halo = how.block, how.tiles.halo
    c = pl.num_programs(2) - 1 - pl.program_id(2)
    q, k, v, marks = how.read(c, refs)
    do = how.outputs.read(do_ref, c).astype(do_ref.dtype)

    start_block(how, dk_sum, dv_sum)
    parts = []
    for at in range(0, block, TILE):
        tile = how.tiles.cut(at, q, k, v, marks, c * block)
        here, near = slice(at, at + TILE), slice(at, at + TILE + halo)
        dq, dk, dv = how.tiles.backward(*tile, do[:, here], dlse_ref[:, here])
        parts.append(dq)
        dk_sum[near] += dk
        dv_sum[near] += dv
    how.queries.write(dq_ref, jnp.concatenate(parts, axis=1))
    how.keys.write(dk_ref, dk_sum[halo:][None])
    how.values.write(dv_ref, dv_sum[halo:][None])


def _attend_backward(how, saved, cotangents):
    q, k, v, marks = saved
    do, dlse, _ = cotangents
    at = lambda c: how.queries.count - 1 - c
    place = lambda b, h, c: (b, h, at(c))
    grads = [(q, how.queries), (k, how.keys), (v, how.values)]
    rows = how.block + how.tiles.halo
    found = call(
        partial(_backward_body, how),
        how,
        "arbitrary",
        [
            *how.inputs(at, q, k, v, marks),
            (how.outputs.split(do), how.outputs.group(place)),
            (how.split_rows(dlse.astype(jnp.float32)), how.row_spec(at)),
        ],
        [(heads.shape, x.dtype, heads.group(place)) for x, heads in grads],
        [pltpu.VMEM((rows, width), jnp.float32) for width in (how.dim, how.value_dim)],
        how.flops * 5 // 2,
    )
    return *(heads.join(x) for x, (_, heads) in zip(found, grads)), None


_attend.defvjp(_attend_forward, _attend_backward)
