"""The variants ``sla1`` and ``paper`` on TPU: the sums of a key head's blocks never leave VMEM.

The steps of a key head first read its keys and values and keep ``h_j = phi(K_j)^T V_j`` and ``z_j``
of all blocks; then come its queries, some query blocks a step: the map's rows choose which h_j add
up, and ``o_s + phi(Q_i) (H_i W) / (phi(Q_i) Z_i) + bias`` is written. The gradient does the same
again, adds up the cotangents of h_j from step to step, and then reads keys and values once more.

The sum over blocks is a product with the map of zeros and ones. Blocks lie behind one another, 8
features x H numbers a tile, and the matrix unit sees all blocks' tiles of the same 8 features as
rows: a product with ``map (x) I_8``, 8 times the least arithmetic, but nothing changes places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import dispatch
from flora_jax.kernels.heads import Heads
from flora_jax.kernels.manual_axes import results
from flora_jax.kernels.sla.config import FEATURES
from flora_jax.kernels.sla.linear import Call, Params, sparse_branch
from flora_jax.kernels.sla.pallas_tpu import dot, parts

SUBLANES = 8
"""Rows of a tile of float32."""
ROWS = 2048
"""Queries of a grid step, at most, where 16 blocks are more; and the limit for 8 blocks of keys."""
VMEM = 100 << 20
"""Bytes that a kernel may ask for, of the 128 MiB of a v5e or v6e."""
STEP = 90 << 20
"""Bytes of sums, blocks and tiles of the backward kernel, by ``_memory``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Where the blocks of a call lie; of a step, ``m`` query blocks or ``n`` key blocks."""

    queries: Heads
    keys: Heads
    block_q: int
    block_k: int
    features: Callable[[Array], Array]
    dtype: Any

    @property
    def width(self) -> int:
        return self.keys.width

    @property
    def m(self) -> int:
        return self.queries.block // self.block_q

    @property
    def n(self) -> int:
        return self.keys.block // self.block_k

    @property
    def key_blocks(self) -> int:
        return self.keys.count * self.n

    @property
    def query_steps(self) -> int:
        """Of all query heads that share keys."""
        return self.queries.repeats * self.queries.count

    def rows(self, place: Heads, ref: Any, start: Any, size: int, number: Any) -> Array:
        """Rows of a step's block in float32, zeros behind the end of the tokens."""
        x = ref[pl.ds(pl.multiple_of(start, size), size), :].astype(jnp.float32)
        if place.tokens % place.block == 0:
            return x
        return jnp.where(self.real(place, start, size, number), x, 0.0)

    def real(self, place: Heads, start: Any, size: int, number: Any) -> Array:
        block = jax.lax.rem(number, jnp.array(place.count, number.dtype))
        row = start + jax.lax.broadcasted_iota(jnp.int32, (size, self.width), 0)
        return block * place.block + row < place.tokens


def _sizes(call: Call, q: Array, k: Array) -> _Sizes:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"float32 or bfloat16, not {q.dtype}")
    cfg, rows, width = call.cfg, 32 // q.dtype.itemsize, q.shape[3]
    if cfg.block_q % rows or cfg.block_k % rows or width % SUBLANES:
        raise NotImplementedError(
            f"blocks {cfg.block_q} x {cfg.block_k}, heads of {width}: multiples of {rows} and 8"
        )
    if max(cfg.block_q, cfg.block_k) * SUBLANES > ROWS:
        raise NotImplementedError(f"blocks {cfg.block_q} x {cfg.block_k}: at most {ROWS // 8}")
    place = functools.partial(Heads, batch=q.shape[0], key_heads=k.shape[2], width=width)
    m = 16 if 16 * cfg.block_q <= ROWS else 8
    sizes = _Sizes(
        queries=place(
            tokens=q.shape[1], repeats=q.shape[2] // k.shape[2], block=m * cfg.block_q
        ),
        keys=place(tokens=k.shape[1], block=SUBLANES * cfg.block_k),
        block_q=cfg.block_q, block_k=cfg.block_k, features=FEATURES[cfg.features], dtype=q.dtype,
    )  # fmt: skip
    need = _memory(sizes)
    if need > STEP:
        raise NotImplementedError(f"a head's sums need {need >> 20} MiB of VMEM of {STEP >> 20}")
    return sizes


def _memory(s: _Sizes) -> int:
    """Bytes of VMEM of the backward kernel, roughly."""
    lanes, item = -(-s.width // 128) * 128, jnp.dtype(s.dtype).itemsize
    sums = 4 * s.width * lanes * (2 * s.key_blocks + 2 * s.m + 4)
    blocks = 2 * item * lanes * (4 * s.queries.block + 6 * s.keys.block)
    maps = SUBLANES * s.key_blocks * (s.m * (2 * item + SUBLANES * (item + 4)) + lanes * (item + 4))
    return sums + blocks + maps


def _exact(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """A product of float32 numbers."""
    return dot(x.astype(jnp.float32), y.astype(jnp.float32), axes)


def _maps(s: _Sizes, marginal: Array) -> tuple[Array, Array]:
    """The map ``[B, K, R N_q, N_k]`` in whole steps, float32, and every number 8 times in a row."""
    batch, heads, rows, columns = marginal.shape
    pad = (0, s.queries.count * s.m - rows), (0, s.key_blocks - columns)
    one = jnp.pad(marginal, ((0, 0), (0, 0), *pad))
    one = one.reshape(batch, s.keys.key_heads, -1, s.key_blocks)
    return one.astype(jnp.float32), jnp.repeat(one.astype(s.dtype), SUBLANES, axis=-1)


def _spread(s: _Sizes, wide: Array) -> Array:
    """``map (x) I_8`` of a step's query blocks ``[8 m, 8 N_k]``."""
    iota = lambda shape, axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    rows = SUBLANES * s.m
    repeat = (iota((rows, s.m), 0) >> 3 == iota((rows, s.m), 1)).astype(jnp.float32)
    full = dot(repeat.astype(s.dtype), wide, (1, 0))
    inside = iota(full.shape, 0) & 7 == iota(full.shape, 1) & 7
    return jnp.where(inside, full, 0.0).astype(s.dtype)


def _tiles(s: _Sizes, body: Callable[[Any], None]) -> None:
    """``body`` for every 8 features."""

    def step(t: Any, _: None) -> None:
        body(pl.ds(pl.multiple_of(t * SUBLANES, SUBLANES), SUBLANES))

    jax.lax.fori_loop(0, s.width // SUBLANES, step, None)


def _fill(s: _Sizes, step: Any, k_ref: Any, v_ref: Any, h: Any, z: Any) -> None:
    """The sums of a step's key blocks."""
    p = s.features(s.rows(s.keys, k_ref, 0, s.keys.block, step))
    # Features of zeros are not zero.
    p = jnp.where(s.real(s.keys, 0, s.keys.block, step), p, 0.0).astype(s.dtype)
    v = s.rows(s.keys, v_ref, 0, s.keys.block, step).astype(s.dtype)
    for r in range(s.n):
        part = slice(r * s.block_k, (r + 1) * s.block_k)
        h[step * s.n + r] = dot(p[part], v[part], (0, 0))
    z[pl.ds(pl.multiple_of(step * s.n, s.n), s.n), :] = jnp.sum(
        p.astype(jnp.float32).reshape(s.n, s.block_k, -1), axis=1
    )


def _gather(s: _Sizes, one: Any, wide: Any, h: Any, z: Any, hq: Any, zq: Any) -> Array:
    """The sums that each of a step's query blocks sees; and what chose them."""
    spread = _spread(s, wide[...])

    def some(features: Any) -> None:
        x = h[:, features, :].reshape(-1, s.width).astype(s.dtype)
        hq[:, features, :] = dot(spread, x, (1, 0)).reshape(s.m, SUBLANES, s.width)

    _tiles(s, some)
    zq[...] = _exact(one[...], z[...], (1, 0))
    return spread


def _inverse(p: Array, total: Array) -> Array:
    """Of the denominators, 0 where nothing is seen."""
    below = jnp.sum(p * total, axis=1, keepdims=True)
    return jnp.where(below > 0, 1 / jnp.where(below > 0, below, 1.0), 0.0)


def _phases(s: _Sizes) -> tuple[Any, Any, Any]:
    """This step's number among the keys, the queries, and the keys' gradients."""
    step = pl.program_id(2)
    return step, step - s.keys.count, step - s.keys.count - s.query_steps


def _forward_body(s: _Sizes, base: bool, k_ref, v_ref, q_ref, one, wide, kernel, bias, *refs):
    base_ref, refs = (refs[0], refs[1:]) if base else (None, refs)
    out_ref, h, z, hq, zq = refs
    key, query, _ = _phases(s)

    @pl.when(query < 0)
    def _():
        _fill(s, key, k_ref, v_ref, h, z)

    @pl.when(query >= 0)
    def _():
        _gather(s, one, wide, h, z, hq, zq)

        def block(i: Any, _: None) -> None:
            at = pl.ds(pl.multiple_of(i * s.block_q, s.block_q), s.block_q)
            p = s.features(q_ref[at, :].astype(jnp.float32)).astype(s.dtype)
            state = _exact(hq[i], kernel[...], (1, 0)).astype(s.dtype)
            low = dot(p, state, (1, 0)) * _inverse(p.astype(jnp.float32), zq[pl.ds(i, 1), :])
            if base:
                low = base_ref[at, :].astype(jnp.float32) + (low + bias[...])
            out_ref[at, :] = low.astype(out_ref.dtype)

        jax.lax.fori_loop(0, s.m, block, None)


def _backward_body(s: _Sizes, add: bool, k_ref, v_ref, q_ref, one, wide, kernel, do_ref, *refs):
    adds, refs = (refs[:3], refs[3:]) if add else ((), refs)
    dq_ref, dk_ref, dv_ref, d_kernel, d_bias, h, z, hq, zq, dh, dz, dhq, dzq = refs
    key, query, last = _phases(s)

    @pl.when(key == 0)
    def _():
        for ref in (d_kernel, d_bias, dh, dz):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(query < 0)
    def _():
        _fill(s, key, k_ref, v_ref, h, z)

    @pl.when((query >= 0) & (last < 0))
    def _():
        spread = _gather(s, one, wide, h, z, hq, zq)

        def block(i: Any, _: None) -> None:
            start, total = i * s.block_q, zq[pl.ds(i, 1), :]
            rows = lambda ref: s.rows(s.queries, ref, start, s.block_q, query)
            p, back = jax.vjp(s.features, rows(q_ref))
            do, rounded = rows(do_ref), p.astype(s.dtype).astype(jnp.float32)
            inverse = _inverse(rounded, total)
            state = _exact(hq[i], kernel[...], (1, 0)).astype(s.dtype)
            dp = dot(do.astype(s.dtype), state, (1, 1)) * inverse
            d_below = jnp.sum(rounded * dp, axis=1, keepdims=True) * inverse
            (dq,) = back(dp - d_below * total)
            if add:
                dq += rows(adds[0])
            at = pl.ds(pl.multiple_of(start, s.block_q), s.block_q)
            dq_ref[at, :] = dq.astype(dq_ref.dtype)
            d_state = sum(
                dot(rounded.astype(s.dtype), x, (0, 0)) for x in parts(do * inverse, s.dtype)
            )
            dhq[i] = _exact(d_state, kernel[...], (1, 1))
            dzq[pl.ds(i, 1), :] = -jnp.sum(rounded * d_below, axis=0, keepdims=True)
            d_kernel[...] += _exact(hq[i], d_state, (0, 0))
            d_bias[...] += jnp.sum(do, axis=0, keepdims=True)

        jax.lax.fori_loop(0, s.m, block, None)

        def some(features: Any) -> None:
            x = dhq[:, features, :].reshape(-1, s.width).astype(s.dtype)
            dh[:, features, :] += dot(spread, x, (0, 0)).reshape(-1, SUBLANES, s.width)

        _tiles(s, some)
        dz[...] += _exact(one[...], dzq[...], (0, 0))

    @pl.when(last >= 0)
    def _():
        totals = dz[pl.ds(pl.multiple_of(last * s.n, s.n), s.n), :]
        for r in range(s.n):
            rows = lambda ref: s.rows(s.keys, ref, r * s.block_k, s.block_k, last)  # noqa: B023
            state = dh[last * s.n + r].astype(s.dtype)
            p, back = jax.vjp(s.features, rows(k_ref))
            dp = dot(rows(v_ref).astype(s.dtype), state, (1, 1)) + totals[r : r + 1]
            found = [back(dp)[0], dot(p.astype(s.dtype), state, (1, 0))]
            if add:
                found = [x + rows(ref) for ref, x in zip(adds[1:], found)]
            for ref, x in zip((dk_ref, dv_ref), found):
                ref[r * s.block_k : (r + 1) * s.block_k, :] = x.astype(ref.dtype)


def _run(s: _Sizes, body: Any, arrays: Any, outputs: Any, *, backward: bool) -> list[Array]:
    """A kernel over batch, key heads, and a head's steps in order.

    Args:
      arrays: ``(array, where it lies)``, of keys, queries, maps, or all heads.
      outputs: ``(shape and dtype, where it lies)``.
    """
    first, last = s.keys.count, s.keys.count + s.query_steps

    def key(b: Any, h: Any, c: Any) -> tuple[Any, Any, Any]:
        now = jnp.minimum(c, first - 1)
        return b, h, jnp.where(c < last, now, c - last) if backward else now

    late = lambda b, h, c: (b, h, jnp.maximum(c - last, 0))
    query = lambda b, h, c: (b, h, jnp.clip(c - first, 0, s.query_steps - 1))
    specs = {
        "keys": lambda x: s.keys.one(key),
        "keys late": lambda x: s.keys.one(late),
        "queries": lambda x: s.queries.one(query),
        "map": lambda x: pl.BlockSpec((None, None, s.m, x.shape[3]), lambda *c: (*query(*c), 0)),
        "head": lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0)),
        "all": lambda x: pl.BlockSpec(x.shape, lambda b, h, c: (0, 0)),
    }
    sums = [(s.key_blocks, s.width, s.width), (s.key_blocks, s.width)]
    sums += [(s.m, s.width, s.width), (s.m, s.width)]
    tokens = s.keys.batch * s.keys.key_heads
    tokens *= s.queries.tokens * s.queries.repeats * (5 if backward else 1) + s.keys.tokens * (
        3 if backward else 1
    )
    chosen = s.keys.batch * s.keys.key_heads * s.query_steps * s.m * s.key_blocks
    read = [x for x, _ in [*arrays, *outputs]]
    again = sum(x.size * x.dtype.itemsize for x, where in arrays if where == "keys" and backward)
    return pl.pallas_call(
        body,
        grid=(s.keys.batch, s.keys.key_heads, last + (s.keys.count if backward else 0)),
        in_specs=[specs[where](x) for x, where in arrays],
        out_specs=[specs[where](x) for x, where in outputs],
        out_shape=results([x for x, _ in outputs], [x for x, _ in arrays]),
        scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in sums * (2 if backward else 1)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * s.width**2 * (tokens + SUBLANES * chosen * (2 if backward else 1)),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in read) + again,
            transcendentals=0,
        ),
        interpret=dispatch.interpret_mode(),
    )(*[x for x, _ in arrays])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def main(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    table: Array | None,
    params: Params | None,
    marginal: Array,
) -> Array:
    """As :func:`flora_jax.kernels.sla.linear.marginal`."""
    return _forward(call, q, k, v, table, params, marginal)[0]


def _shared(s: _Sizes, params: Params | None) -> tuple[Array, Array]:
    """Kernel and bias in float32; without a projection the identity."""
    if params is None:
        return jnp.eye(s.width, dtype=jnp.float32), jnp.zeros((1, s.width), jnp.float32)
    return params["kernel"].astype(jnp.float32), params["bias"].astype(jnp.float32)[None]


def _forward(call, q, k, v, table, params, marginal):
    s, sparse, pull = _sizes(call, q, k), None, None
    if table is not None:
        sparse, pull = jax.vjp(lambda *x: sparse_branch(call, *x, table), q, k, v)
    of_queries, of_keys = s.queries, s.keys
    (one, wide), (kernel, bias) = _maps(s, marginal), _shared(s, params)
    arrays = [(of_keys.split(k), "keys"), (of_keys.split(v), "keys")]
    arrays += [(of_queries.split(q), "queries"), (one, "map"), (wide, "map")]
    arrays += [(kernel, "all"), (bias, "all")]
    if sparse is not None:
        arrays.append((of_queries.split(sparse), "queries"))
    dtype = jnp.float32 if sparse is None else q.dtype
    out = jax.ShapeDtypeStruct(of_queries.shape, dtype), "queries"
    body = functools.partial(_forward_body, s, sparse is not None)
    (found,) = _run(s, body, arrays, [out], backward=False)
    return of_queries.join(found), (q, k, v, params, table, marginal, pull)


def _backward(call, saved, do):
    q, k, v, params, table, marginal, pull = saved
    s = _sizes(call, q, k)
    (one, wide), (kernel, _) = _maps(s, marginal), _shared(s, params)
    places = [(s.queries, "queries"), (s.keys, "keys late"), (s.keys, "keys late")]
    arrays = [(s.keys.split(k), "keys"), (s.keys.split(v), "keys")]
    arrays += [(s.queries.split(q), "queries"), (one, "map"), (wide, "map"), (kernel, "all")]
    arrays += [(s.queries.split(do), "queries")]
    if pull is not None:
        arrays += [(at.split(x), where) for (at, where), x in zip(places, pull(do))]
    lead = s.keys.batch, s.keys.key_heads
    outputs = [(jax.ShapeDtypeStruct(at.shape, q.dtype), where) for at, where in places]
    small = [jax.ShapeDtypeStruct((*lead, rows, s.width), jnp.float32) for rows in (s.width, 1)]
    outputs += [(x, "head") for x in small]
    body = functools.partial(_backward_body, s, pull is not None)
    *found, d_kernel, d_bias = _run(s, body, arrays, outputs, backward=True)
    dq, dk, dv = (at.join(x) for (at, _), x in zip(places, found))
    d_params = params
    if params is not None:
        d_params = {"kernel": d_kernel.sum(axis=(0, 1)), "bias": d_bias.sum(axis=(0, 1, 2))}
        d_params = {name: x.astype(params[name].dtype) for name, x in d_params.items()}
    none = lambda x: None if x is None else np.zeros(x.shape, jax.dtypes.float0)
    return dq, dk, dv, none(table), d_params, none(marginal)


main.defvjp(_forward, _backward)
