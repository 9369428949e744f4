"""Pallas for Hopper GPUs: the states between chunks in a scan, then all chunks at once.

A program of the scan owns 64 x 64 numbers of a head's state, in registers and in float32, and
writes it before every chunk, in bfloat16, as products take it. The cotangents of the states are the
same scan from the end. With both at hand chunks do not depend on each other: a program per chunk
computes the output, or all gradients. The arithmetic is that of :mod:`tiles64`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import costs, hopper
from flora_jax.kernels.gated_linear_attention import tiles64
from flora_jax.kernels.gated_linear_attention.tiles64 import PRODUCT, SIDE, TILE
from flora_jax.kernels.gated_linear_attention.warpgroup import (
    WGMMA,
    Machine,
    decay_gate,
    meet,
    store,
)


def mosaic_gpu(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    state: Array,
    segments: Array | None,
    *,
    scale: float,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Arguments and results as of :func:`flora_jax.kernels.gated_linear_attention.xla.xla`.

    Raises:
      NotImplementedError: what :func:`supported` refuses.
    """
    supported(q, k, v, segments, chunk)
    return _attend(scale, q, k, v, g, state)


def supported(q: Array, k: Array, v: Array, segments: Array | None, chunk: int | None) -> None:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        # In float16 a state, a sum over all tokens, overflows.
        raise NotImplementedError(f"q, k and v in bfloat16, not {', '.join(sorted(dtypes))}")
    widths = q.shape[3], v.shape[3]
    if widths not in ((64, 64), (128, 128)):
        raise NotImplementedError(f"heads of 64 or 128 for keys and values alike, not {widths}")
    if segments is not None:
        raise NotImplementedError("segments")
    if q.shape[1] == 1:
        raise NotImplementedError("a single token")
    if chunk not in (None, SIDE):
        raise NotImplementedError(f"chunks of {SIDE}, not {chunk}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    batch: int
    heads: int
    group: int
    chunks: int
    width: int
    """Tiles of a head's channels: 1 or 2."""
    gate: str
    """``channel``, ``head`` or ``none``."""

    @property
    def gated(self) -> bool:
        return self.gate != "none"

    def gates(self, *lead: int) -> list[Any]:
        """Shared memory for the log-decays of a chunk: one array, or none."""
        if self.gate == "channel":
            return [hopper.float_tiles(*lead, SIDE, SIDE)]
        return [plgpu.SMEM((*lead, SIDE), jnp.float32)] if self.gated else []

    def gate_of(self, ref: Any, batch: Any, chunk: Any, head: Any, columns: Any) -> Any:
        """Where a chunk's log-decays are."""
        if self.gate == "channel":
            return ref.at[batch, _at(chunk), head, columns]
        return ref.at[batch, head, _at(chunk)]

    @property
    def gate_bytes(self) -> int:
        """Of a chunk's log-decays, for 64 channels."""
        return {"channel": 2 * TILE, "head": 4 * SIDE, "none": 0}[self.gate]

    def states(self, heads: int, dtype: Any, *lead: int) -> jax.ShapeDtypeStruct:
        dim = self.width * SIDE
        return jax.ShapeDtypeStruct((self.batch, heads, *lead, dim, dim), dtype)


def _sizes(q: Array, k: Array, g: Array | None) -> _Sizes:
    batch, length, heads, dim = k.shape
    return _Sizes(
        batch=batch,
        heads=heads,
        group=q.shape[2] // heads,
        chunks=-(-length // SIDE),
        width=dim // SIDE,
        gate="none" if g is None else "channel" if g.shape[3] > 1 else "head",
    )


def _logs(g: Array | None) -> list[Array]:
    """As the kernels read them: ``[B, T, H, K]``, for a gate per head ``[B, H, T']``.

    Zeros behind the end, like those of q, k and v, leave the state as it is.
    """
    if g is None:
        return []
    g = g.astype(jnp.float32)
    if g.shape[3] > 1:
        return [hopper.whole(g, SIDE)]
    return [jnp.pad(g[..., 0].swapaxes(1, 2), ((0, 0), (0, 0), (0, -g.shape[1] % SIDE)))]


def _at(number: Any) -> Any:
    """The 64 rows or columns of a tile."""
    return pl.ds(number * SIDE, SIDE)


def _place() -> tuple[Any, ...]:
    return tuple(lax.axis_index(name) for name in ("chunk", "head", "batch", "wg"))


def _scan(
    s: _Sizes, x: Array, y: Array, logs: Sequence[Array], first: Array,
    decay: Callable[..., Any], scale: float, reverse: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """``(states before every chunk [B, H, n, V, K] bfloat16, the last state float32)``.

    Args:
      x: keys ``[B, T, H, K]``, or queries, whose heads share the decays of one.
      y: values, or the output's cotangent.
      first: ``[B, H, V, K]`` float32.
      decay, scale: of :func:`tiles64.update`.
      reverse: from the last chunk to the first.
    """
    heads, group = x.shape[2], x.shape[2] // s.heads
    slots = hopper.slots(6 * TILE, 4 * TILE, s.chunks)

    def body(x_ref, y_ref, *refs):
        *g_ref, first_ref, before_ref, last_ref, buffers, tiles, ring, arrived = refs
        high, low, room, out, own = tiles
        stream = hopper.Ring(buffers, *ring, slots, loaded=True)
        tile, h, b, wg = _place()
        rows, columns = _at(tile // s.width), _at(lax.rem(tile, s.width))
        chunk = lambda t: s.chunks - 1 - t if reverse else t

        @pl.when(wg == 0)
        def _():
            m = Machine()
            plgpu.copy_gmem_to_smem(first_ref.at[b, h, rows, columns], own, arrived)
            plgpu.barrier_wait(arrived)

            def step(t, buffers, state):
                x, y, *logs = buffers
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                m.write(out, state)
                plgpu.copy_smem_to_gmem(out, before_ref.at[b, h, chunk(t), rows, columns])
                gate = decay_gate(m, logs, tiles64.Pair(high, low))
                return tiles64.update(m, state, x, y, gate, decay, scale, room)

            state = stream.each(s.chunks, step, hopper.load(own, WGMMA))
            store(own, state)
            plgpu.copy_smem_to_gmem(own, last_ref.at[b, h, rows, columns])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            def sources(t):
                c = chunk(t)
                return (
                    x_ref.at[b, _at(c), h, columns],
                    y_ref.at[b, _at(c), h, rows],
                    *(s.gate_of(ref, b, c, h // group, columns) for ref in g_ref),
                )

            stream.fill(s.chunks, sources, registers=None)

    tiles = partial(hopper.tiles, dtype=jnp.bfloat16)
    scratch = [
        [*[tiles(slots, SIDE, SIDE)] * 2, *s.gates(slots)],
        [*[tiles(SIDE, SIDE)] * 4, hopper.float_tiles(SIDE, SIDE)],
        hopper.ring_barriers(2 + s.gated, 1, slots),
        plgpu.Barrier(),
    ]
    types = s.states(heads, jnp.bfloat16, s.chunks), s.states(heads, jnp.float32)
    grid = {"chunk": s.width**2, "head": heads, "batch": s.batch}
    parts = math.prod(grid.values())
    work = costs.Work(
        flops=parts * s.chunks * PRODUCT,
        bytes=parts * (s.chunks * (3 * TILE + s.gate_bytes) + 4 * TILE),
    )
    return hopper.kernel(body, types, scratch, grid, 2, work=work)(x, y, *logs, first)


def _fetch(
    s: _Sizes, place: Sequence[Any], barrier: Any, queries: Any, keys: Any, logs: Any, states: Any
) -> None:
    """Starts the copies of a chunk's inputs, each into a warpgroup's own tiles.

    Args:
      place: chunk, query head, batch, warpgroup.
      queries, keys, logs: pairs of references, from and to.
      states: such pairs, each behind the head whose state it is.
    """
    c, n, b, wg = place
    columns = _at(wg)
    for head, pairs in ((n, queries), (n // s.group, keys)):
        for source, tiles in pairs:
            plgpu.copy_gmem_to_smem(source.at[b, _at(c), head, columns], tiles.at[wg], barrier)
    for source, tiles in logs:
        source = s.gate_of(source, b, c, n // s.group, columns)
        plgpu.copy_gmem_to_smem(source, tiles.at[wg], barrier)
    for head, source, tiles in states:
        for u in range(s.width):
            tile = source.at[b, head, c, columns, _at(u)]
            plgpu.copy_gmem_to_smem(tile, tiles.at[wg, u], barrier)


def _over_chunks(
    s: _Sizes, body: Any, types: Any, tiles: int, states: int, arrived: Any,
    products: tuple[int, int], copies: tuple[int, int],
) -> Callable[..., Any]:  # fmt: skip
    """A program per chunk and query head, a warpgroup per 64 channels.

    Args:
      body: ``(*inputs, *outputs, tiles and states, decays, arrived, met)``.
      tiles, states: how many of either a warpgroup has in shared memory.
      arrived: barrier of the inputs.
      products: with a chunk's tokens and with states, apart from what decays add.
      copies: of a warpgroup's tiles but states, and of log-decays.
    """
    shared = partial(hopper.tiles, s.width, dtype=jnp.bfloat16)
    scratch = [
        [*[shared(SIDE, SIDE)] * tiles, *[shared(s.width, SIDE, SIDE)] * states],
        s.gates(s.width),
        arrived,
        plgpu.Barrier(num_arrivals=s.width),
    ]
    grid = {"chunk": s.chunks, "head": s.heads * s.group, "batch": s.batch}
    parts, tokens = math.prod(grid.values()), copies[0] + states * s.width
    work = costs.Work(
        flops=parts * s.width * (products[0] + products[1] * s.width) * PRODUCT,
        bytes=parts * s.width * (tokens * TILE + copies[1] * s.gate_bytes),
    )
    return hopper.kernel(body, types, scratch, grid, s.width, work=work)


def _outputs(
    s: _Sizes, scale: float, q: Array, k: Array, v: Array, logs: Sequence[Array], before: Array
) -> Array:
    """``o``."""

    def body(q_ref, k_ref, v_ref, *refs):
        *g_ref, before_ref, o_ref, tiles, decays, arrived, met = refs
        q, k, v, z, high, low, states = tiles
        c, n, b, wg = place = _place()
        _fetch(
            s, place, arrived.at[wg], [(q_ref, q)], [(k_ref, k), (v_ref, v)],
            zip(g_ref, decays), [(n // s.group, before_ref, states)],
        )  # fmt: skip
        plgpu.barrier_wait(arrived.at[wg])
        m = Machine()
        gate = decay_gate(m, [x.at[wg] for x in decays], tiles64.Pair(high.at[wg], low.at[wg]))
        tiles64.forward(m, q.at[wg], k.at[wg], gate, z.at[wg])
        meet(met)
        each = lambda x: [x.at[u] for u in range(s.width)]
        o = tiles64.outputs(m, each(q), each(z), v.at[wg], each(states.at[wg]), scale)
        m.write(k.at[wg], o)
        plgpu.copy_smem_to_gmem(k.at[wg], o_ref.at[b, _at(c), n, _at(wg)])
        plgpu.wait_smem_to_gmem(0)

    arrived = plgpu.Barrier(num_arrivals=3 + s.gated + s.width, num_barriers=s.width)
    types = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = _over_chunks(s, body, types, 6, 1, arrived, products=(2, 1), copies=(4, 1))
    return run(q, k, v, *logs, before)


def _gradients(
    s: _Sizes, scale: float, q: Array, k: Array, v: Array, logs: Sequence[Array], before: Array,
    do: Array, d_after: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """``(dq, dk, dv[, dg])``, each per query head.

    For a gate per head dg is ``[B, N, tiles, T']``, in as many parts as a head has tiles.
    """

    def body(q_ref, k_ref, v_ref, *refs):
        *refs, tiles, decays, arrived, met = refs
        g_ref, refs = refs[: len(logs)], refs[len(logs) :]
        before_ref, do_ref, d_after_ref, dq_ref, dk_ref, dv_ref, *dg_ref = refs
        q, k, v, do, z, keys, high, low, states, d_states = tiles
        c, n, b, wg = place = _place()
        at, mine = _at(c), _at(wg)
        _fetch(
            s, place, arrived, [(do_ref, do), (q_ref, q)], [(v_ref, v), (k_ref, k)],
            zip(g_ref, decays),
            [(n // s.group, before_ref, states), (n, d_after_ref, d_states)],
        )  # fmt: skip
        plgpu.barrier_wait(arrived)
        m, room = Machine(), tiles64.Pair(high.at[wg], low.at[wg])
        decays = [x.at[wg] for x in decays]
        gate = decay_gate(m, decays, room)
        each = lambda x: [x.at[u] for u in range(s.width)]
        column = lambda x: [x.at[u, wg] for u in range(s.width)]
        chunk = tiles64.Chunk(
            q.at[wg], k.at[wg], each(v), each(do), column(states), column(d_states), z.at[wg],
            keys.at[wg],
        )  # fmt: skip
        dq, dk, dg = tiles64.gradient(m, chunk, gate, room, scale)
        m.write(q.at[wg], dq)
        m.write(k.at[wg], dk)
        plgpu.copy_smem_to_gmem(q.at[wg], dq_ref.at[b, at, n, mine])
        plgpu.copy_smem_to_gmem(k.at[wg], dk_ref.at[b, at, n, mine])
        for tile, ref in zip(decays, dg_ref):
            whole = s.gate == "channel"
            store(tile, dg if whole else jnp.sum(dg, axis=1))
            plgpu.copy_smem_to_gmem(tile, ref.at[b, at, n, mine] if whole else ref.at[b, n, wg, at])
        meet(met)
        dv = tiles64.value_gradient(m, each(z), do.at[wg], each(keys), each(d_states.at[wg]))
        m.write(v.at[wg], dv)
        plgpu.copy_smem_to_gmem(v.at[wg], dv_ref.at[b, at, n, mine])
        plgpu.wait_smem_to_gmem(0)

    types = [jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3
    if s.gated:
        parts = s.batch, q.shape[2], s.width, s.chunks * SIDE
        types.append(jax.ShapeDtypeStruct(q.shape if s.gate == "channel" else parts, jnp.float32))
    arrived = plgpu.Barrier(num_arrivals=s.width * (4 + s.gated + 2 * s.width))
    run = _over_chunks(s, body, types, 8, 2, arrived, products=(5, 3), copies=(7, 2))
    return run(q, k, v, *logs, before, do, d_after)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, g, state):
    s, length = _sizes(q, k, g), q.shape[1]
    q, k, v = (hopper.whole(x, SIDE) for x in (q, k, v))
    logs = _logs(g)
    before, last = _scan(s, k, v, logs, state.swapaxes(2, 3), tiles64.out, 1.0)
    out = _outputs(s, scale, q, k, v, logs, before)
    return out[:, :length], last.swapaxes(2, 3)


def _attend_forward(scale, q, k, v, g, state):
    return _attend(scale, q, k, v, g, state), (q, k, v, g, state)


def _attend_backward(scale, saved, cotangents):
    q, k, v, g, state = like = saved
    d_out, d_last = cotangents
    s, length = _sizes(q, k, g), q.shape[1]
    q, k, v, do = (hopper.whole(x, SIDE) for x in (q, k, v, d_out.astype(q.dtype)))
    logs = _logs(g)
    before, _ = _scan(s, k, v, logs, state.swapaxes(2, 3), tiles64.out, 1.0)
    # All is linear in the cotangents: the heads that share a state are computed as if each had its
    # own, of which the first has the last state's cotangent, and added up.
    d_last = d_last.astype(jnp.float32).swapaxes(2, 3)[:, :, None]
    d_last = jnp.pad(d_last, ((0, 0), (0, 0), (0, s.group - 1), (0, 0), (0, 0)))
    d_last = d_last.reshape(s.batch, -1, *d_last.shape[3:])
    d_after, d_first = _scan(s, q, do, logs, d_last, tiles64.into, scale, reverse=True)
    dq, dk, dv, *dg = _gradients(s, scale, q, k, v, logs, before, do, d_after)
    if s.gate == "head":
        dg = [dg[0].sum(2).swapaxes(1, 2)[..., None]]

    def add(x: Array, like: Array, axis: int = 2) -> Array:
        """Over the heads that share keys."""
        if s.group == 1:
            return x.astype(like.dtype)
        shape = (*x.shape[:axis], s.heads, s.group, *x.shape[axis + 1 :])
        return x.reshape(shape).astype(jnp.float32).sum(axis + 1).astype(like.dtype)

    dk, dv, *dg = (add(x[:, :length], y) for x, y in zip((dk, dv, *dg), like[1:]))
    d_state = add(d_first, state, axis=1).swapaxes(2, 3)
    return dq[:, :length], dk, dv, dg[0] if dg else None, d_state


_attend.defvjp(_attend_forward, _attend_backward)
