"""Pallas for TPU: a step takes 128 tokens of a key head, for the window and for the recurrence.

The kernels are those of the two ops laid over each other: queries, keys and values are read once,
and the sum is all that is written. The state of the recurrence stays in VMEM from step to step, on
the way back its cotangent, and beside it what queries add to the keys before their step. The states
between the steps come from the kernel of the recurrence alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels.gated_linear_attention import pallas_tpu as recurrence
from flora_jax.kernels.gated_linear_attention import tiles as recurrence_tiles
from flora_jax.kernels.window_attention import pallas_tpu as near
from flora_jax.kernels.window_attention.tiles import TILE, Tiles


def pallas_tpu(
    q: Array,
    k: Array,
    v: Array,
    q_plain: Array,
    k_plain: Array,
    *,
    features: Any,
    window: int,
    weights: tuple[float, float],
    scale: float,
    chunk: int | None = None,
) -> Array:
    """The result of the op.

    Raises:
      NotImplementedError: a single token, another chunk than 128, a window of more than 129 keys,
        dtypes other than float32 and bfloat16, or heads so large that a step does not fit the VMEM.
    """
    batch, length, heads, dim = q.shape
    key_heads, value_dim = k.shape[2], v.shape[3]
    if length == 1:
        raise NotImplementedError("a single token")
    if chunk not in (None, TILE):
        raise NotImplementedError(f"chunks of {chunk}, not of {TILE}")
    if window > TILE + 1:
        raise NotImplementedError(f"a window of {window} keys; {TILE + 1} fit")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"dtype {q.dtype}")
    group = heads // key_heads
    tiles = Tiles(window=window, halo=near.power(window - 1, 16), group=group, scale=scale)
    window_how = near.How(
        tiles=tiles, batch=batch, length=length, key_heads=key_heads, dim=dim, value_dim=value_dim,
        block=TILE, marked=False,
    )  # fmt: skip
    need = window_how.step_bytes() + recurrence.step_bytes(group, TILE, dim, value_dim)
    if need > near.VMEM:
        raise NotImplementedError(f"a step needs {need >> 20} MiB of VMEM of {near.VMEM >> 20}")
    how = _How(
        near=window_how,
        far=recurrence.How(scale=1.0, chunk=TILE, features=features),
        sizes=recurrence.Sizes(
            batch=batch, heads=key_heads, group=group, length=length, chunk=TILE, dim=dim,
            value_dim=value_dim, gate=dim, given=False,
        ),
        weights=weights,
    )  # fmt: skip
    return _attend(how, q, k, v, q_plain, k_plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """What is static of one call: of the window, of the recurrence, and of their sum."""

    near: near.How
    far: recurrence.How
    sizes: recurrence.Sizes
    weights: tuple[float, float]

    def inputs(self, at: Any, q: Any, k: Any, v: Any, q_plain: Any, k_plain: Any) -> list[Any]:
        """Arrays and their blocks; ``at`` maps a step of the grid to a block."""
        place = lambda b, h, c: (b, h, at(c))
        plain = ((self.near.queries, q_plain), (self.near.keys, k_plain))
        blocks = [(heads.split(x), heads.group(place)) for heads, x in plain]
        return [*self.near.inputs(at, q, k, v, None), *blocks]

    def read(self, c: Any, refs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The window's tile, and ``q_plain, k_plain, v`` of the recurrence in float32."""
        *refs, q_ref, k_ref = refs
        q, k, v, _ = self.near.read(c, refs)
        tile = self.near.tiles.cut(0, q, k, v, (), c * TILE)
        q, k = self.near.queries.read(q_ref, c), self.near.keys.read(k_ref, c)[0]
        return tile, q, k, v[self.near.tiles.halo :].astype(jnp.float32)


def _forward_body(how: _How, dot: Any, *refs: Any) -> None:
    q_ref, k_ref, v_ref, *plain, out_ref, state, k_before, v_before = refs
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        for kept in (state, k_before, v_before):
            kept[...] = jnp.zeros_like(kept)

    tile, q, k, v = how.read(c, (q_ref, k_ref, v_ref, k_before, v_before, *plain))
    for kept, ref in ((k_before, k_ref), (v_before, v_ref)):
        kept[...] = ref[..., TILE - how.near.tiles.halo :, :]
    close, _, _ = how.near.tiles.forward(*tile)
    q, k, g = recurrence.prepared(how.far, how.sizes, c, q, k, None)
    far, state[...] = recurrence_tiles.forward(q, k, v, g, state[...], dot=dot)
    how.near.outputs.write(out_ref, how.weights[0] * close + how.weights[1] * far)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, *arrays):
    s, dtype = how.sizes, arrays[0].dtype
    q, k, v, k_before, v_before, *plain = how.inputs(lambda c: c, *arrays)
    # The steps of a head come in order: the last keys of one are those before the next.
    kept = [
        pltpu.VMEM(tuple(n for n in spec.block_shape if n), x.dtype)
        for x, spec in (k_before, v_before)
    ]
    (out,) = near.call(
        partial(_forward_body, how, recurrence.operands(dtype)),
        how.near,
        "arbitrary",
        [q, k, v, *plain],
        [(how.near.outputs.shape, dtype, how.near.outputs.group(lambda *step: step))],
        [pltpu.VMEM((s.value_dim, s.dim), jnp.float32), *kept],
        int(how.near.flops + s.flops),
    )
    return how.near.outputs.join(out)


def _attend_forward(how, *arrays):
    return _attend(how, *arrays), arrays


def _backward_body(how: _How, dot: Any, *refs: Any) -> None:
    *refs, dk_sum, dv_sum, d_state, later = refs
    *refs, dq_ref, dk_ref, dv_ref, dq_plain_ref, dk_plain_ref = refs
    *refs, before_ref, do_ref = refs
    n, s = how.near, how.sizes
    halo, c = n.tiles.halo, pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = jnp.zeros_like(d_state)
        later[...] = jnp.zeros_like(later)

    near.start_block(n, dk_sum, dv_sum)
    tile, q, k, v = how.read(c, refs)
    do = n.outputs.read(do_ref, c)
    close, far = (weight * do for weight in how.weights)
    no_lse = jnp.zeros((n.tiles.group, TILE), jnp.float32)
    dq, dk, dv = n.tiles.backward(*tile, close.astype(do_ref.dtype), no_lse)
    dk_sum[...] += dk
    dv_sum[...] += dv
    n.queries.write(dq_ref, dq)
    n.keys.write(dk_ref, dk_sum[halo:][None])
    (q, k, g), pull = jax.vjp(partial(recurrence.prepared, how.far, s, c), q, k, None)
    dq, dk, dv, dg, d_state[...], later[...] = recurrence_tiles.backward(
        q, k, v, g, before_ref[0, 0, 0], far, d_state[...], later[...], dot=dot
    )
    dq, dk, _ = pull((dq, dk, dg))
    n.queries.write(dq_plain_ref, dq)
    n.keys.write(dk_plain_ref, dk[None])
    n.values.write(dv_ref, (dv_sum[halo:] + dv)[None])


def _attend_backward(how, arrays, do):
    q, k, v, q_plain, k_plain = arrays
    n, s, dot = how.near, how.sizes, recurrence.operands(q.dtype)
    at = lambda c: n.queries.count - 1 - c
    place = lambda b, h, c: (b, h, at(c))
    state = s.value_dim, s.dim
    none = jnp.zeros((*s.lead, *state), jnp.float32)
    before, _ = recurrence.states_before(how.far, s, dot, k_plain, v, None, none)
    spec = pl.BlockSpec((1, 1, 1, *state), lambda *step: (*place(*step), 0, 0))
    inputs = [
        *how.inputs(at, *arrays),
        (before, spec),
        (n.outputs.split(do), n.outputs.group(place)),
    ]
    grads = list(zip(arrays, (n.queries, n.keys, n.values, n.queries, n.keys)))
    rows = TILE + n.tiles.halo
    shapes = [(rows, s.dim), (rows, s.value_dim), state, (1, s.dim)]
    found = near.call(
        partial(_backward_body, how, dot),
        n,
        "arbitrary",
        inputs,
        [(heads.shape, x.dtype, heads.group(place)) for x, heads in grads],
        [pltpu.VMEM(shape, jnp.float32) for shape in shapes],
        int(n.flops * 5 // 2 + 3 * s.flops),
    )
    return tuple(heads.join(x) for x, (_, heads) in zip(found, grads))


_attend.defvjp(_attend_forward, _attend_backward)
