"""The variant ``main`` on TPU: keys and values are read once, queries once, and nothing in between.

A first kernel adds up ``S = phi(k)^T v`` and ``z = sum phi(k)`` of a key head in VMEM. The
projection W is applied to the state, ``phi(q) S W = phi(q) (S W)``: ``[F, H]`` numbers of a head
instead of its tokens. A second kernel gives ``o_s + phi(q) S W / (phi(q) z + eps) + bias``.

The gradient is the same in reverse, features computed again: queries and cotangents give dq and the
state's cotangents, keys and values then dk and dv. Each kernel adds the softmax branch's gradient,
so that no sum of gradients is a pass of its own.
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

from flora_jax.kernels import costs, dispatch
from flora_jax.kernels.heads import Heads
from flora_jax.kernels.manual_axes import results
from flora_jax.kernels.sla.config import FEATURES
from flora_jax.kernels.sla.linear import EPSILON, Call, Params, project, sparse_branch

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""In a grid step, or all there are."""
VMEM = 64 << 20
"""Bytes that one kernel may ask for."""
STEP = 48 << 20
"""Bytes of blocks and tiles per grid step, by ``_memory``."""
ARRAYS, FEATURE = 6, 30
"""Of the kernel that reads and writes most of them; element-wise operations per number, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Where the blocks of a call lie, and what a step computes with."""

    queries: Heads
    keys: Heads
    features: Callable[[Array], Array]
    dtype: Any

    @property
    def lead(self) -> tuple[int, int]:
        return self.keys.batch, self.keys.key_heads

    @property
    def square(self) -> tuple[int, int]:
        return self.keys.width, self.keys.width


def _sizes(call: Call, q: Array, k: Array) -> _Sizes:
    """Raises NotImplementedError with the reason when the kernels cannot take a call."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"float32 or bfloat16, not {q.dtype}")
    batch, _, heads, width = q.shape
    repeats, rows = heads // k.shape[2], 32 // q.dtype.itemsize

    def place(x: Array, repeats: int) -> Heads:
        whole = Heads(
            batch=batch, tokens=x.shape[1], key_heads=k.shape[2], repeats=repeats, width=width,
            block=-(-x.shape[1] // rows) * rows,
        )  # fmt: skip
        return _cut(whole, q.dtype, call.tokens)

    return _Sizes(
        queries=place(q, repeats), keys=place(k, 1), features=FEATURES[call.cfg.features],
        dtype=q.dtype,
    )  # fmt: skip


def _cut(whole: Heads, dtype: Any, tokens: int | None) -> Heads:
    """``whole`` in blocks of so many tokens, by default the cheapest that fit: longer ones make
    fewer steps and have more of their last behind the end."""
    rows = 32 // jnp.dtype(dtype).itemsize
    cuts = {min(n, whole.block) for n in ((tokens,) if tokens else (*TOKENS, whole.block))}

    def refusal(block: int) -> str | None:
        if block % rows:
            return f"a step of {block} tokens is no multiple of {rows}"
        need = _memory(whole, block, dtype)
        if need > STEP:
            return f"a step of {block} needs {need >> 20} MiB of VMEM of {STEP >> 20}"
        return None

    def seconds(block: int) -> float:
        steps = whole.batch * whole.key_heads * -(-whole.tokens // block)
        numbers = steps * block * whole.repeats * whole.width
        moved = ARRAYS * numbers * jnp.dtype(dtype).itemsize
        work = costs.Work(flops=2 * ARRAYS * numbers * costs.TPU.pad(whole.width), bytes=moved)
        return costs.TPU.seconds(work, FEATURE * numbers, steps)

    block = costs.cheapest(sorted(cuts), refusal=refusal, seconds=seconds, what="cut of the tokens")
    return dataclasses.replace(whole, block=block)


def _memory(place: Heads, block: int, dtype: Any) -> int:
    """Bytes of VMEM of a step of the largest kernel, roughly: blocks twice, tiles in float32."""
    lanes = costs.TPU.pad(place.width)
    rows = place.repeats * block
    return rows * lanes * (2 * ARRAYS * jnp.dtype(dtype).itemsize + 8 * 4) + 8 * 4 * lanes**2


def dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Of two matrices over one axis each, float32: exact products, or float32 sums of bfloat16."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def _rows(place: Heads, ref: Any) -> Array:
    """A step's block in float32, heads below each other, zeros behind the end: ``[R C, H]``."""
    return place.read(ref, pl.program_id(2)).reshape(-1, place.width)


def _write(place: Heads, ref: Any, x: Array) -> None:
    place.write(ref, x.reshape(place.repeats, place.block, -1))


def parts(x: Array, dtype: Any) -> list[Array]:
    """Numbers of ``dtype`` that add up to ``x``: a sum over tokens may cancel, rounding does not.

    Features are positive and much alike, so the state's cotangent is close to a plain sum of do.
    """
    if dtype == jnp.float32:
        return [x]
    high = x.astype(dtype)
    return [high, (x - high.astype(jnp.float32)).astype(dtype)]


def _real(place: Heads, x: Array) -> Array:
    """Features of a step, zeros behind the end: those of zeros are not zero."""
    if place.tokens % place.block == 0:
        return x
    row = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0), place.block)
    return jnp.where(pl.program_id(2) * place.block + row < place.tokens, x, 0.0)


def _start(*refs: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)


def _call(s: _Sizes, body: Any, place: Heads, inputs: Any, outputs: Any, products: int) -> Any:
    """A kernel over ``(batch, key head, block)``, blocks in order; absent inputs are None.

    Args:
      inputs: arrays ``[B, T, N, H]`` or what a key head has once, ``[B, K, rows, H]`` (``[1, H]``:
        all have the same), in a list of their own.
      outputs: dtypes of arrays like ``place``, and the rows of float32 ``[B, K, rows, H]``.
      products: with H x H numbers, per token and head.
    """
    tokens, small = inputs
    group = place.group(lambda *step: step)
    once = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0))
    shared = lambda x: pl.BlockSpec(x.shape, lambda b, h, c: (0, 0))
    given = [(place.split(x), group) for x in tokens if x is not None]
    given += [(x, once(x) if x.ndim == 4 else shared(x)) for x in small if x is not None]
    types = [(jax.ShapeDtypeStruct(place.shape, dtype), group) for dtype in outputs[0]]
    for rows in outputs[1]:
        x = jax.ShapeDtypeStruct((*s.lead, rows, place.width), jnp.float32)
        types.append((x, once(x)))
    arrays = [x for x, _ in given]
    moved = sum(x.size * x.dtype.itemsize for x, _ in [*given, *types])
    count = place.batch * place.tokens * place.key_heads * place.repeats
    found = pl.pallas_call(
        body,
        grid=(*s.lead, place.count),
        in_specs=[spec for _, spec in given],
        out_specs=[spec for _, spec in types],
        out_shape=results([x for x, _ in types], arrays),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * count * place.width**2, bytes_accessed=moved, transcendentals=0
        ),
        interpret=dispatch.interpret_mode(),
    )(*arrays)
    whole = len(outputs[0])
    return [place.join(x) for x in found[:whole]], found[whole:]


def _states_body(s, k_ref, v_ref, state, total):
    _start(state, total)
    pk = _real(s.keys, s.features(_rows(s.keys, k_ref))).astype(s.dtype)
    state[...] += dot(pk, _rows(s.keys, v_ref).astype(s.dtype), (0, 0))
    total[...] += jnp.sum(pk.astype(jnp.float32), axis=0, keepdims=True)


def _states(s: _Sizes, k: Array, v: Array) -> tuple[Array, Array]:
    """``(S [B, K, F, H], z [B, K, 1, F])``, float32."""
    body = functools.partial(_states_body, s)
    return _call(s, body, s.keys, ([k, v], []), ([], [s.keys.width, 1]), 1)[1]


def _mix_body(s, base, q_ref, *refs):
    base_ref, refs = (refs[0], refs[1:]) if base else (None, refs)
    state, total, *bias, out_ref = refs
    p = s.features(_rows(s.queries, q_ref)).astype(s.dtype)
    below = jnp.sum(p.astype(jnp.float32) * total[...], axis=1, keepdims=True) + EPSILON
    out = dot(p, state[...], (1, 0)) / below
    if base:
        out = _rows(s.queries, base_ref) + (out + bias[0][...])
    _write(s.queries, out_ref, out)


def _mix(s: _Sizes, q: Array, base: Array | None, state: Array, total: Array, bias: Any) -> Array:
    """``phi(q) S / (phi(q) z + eps)``, float32; added to ``base`` with the bias, as ``base``."""
    body = functools.partial(_mix_body, s, base is not None)
    dtype = jnp.float32 if base is None else base.dtype
    inputs = [q, base], [state, total, bias]
    return _call(s, body, s.queries, inputs, ([dtype], []), 1)[0][0]


def _queries_back_body(s, add, q_ref, do_ref, *refs):
    add_ref, refs = (refs[0], refs[1:]) if add else (None, refs)
    state, total, dq_ref, d_state, d_total, d_bias = refs
    _start(d_state, d_total, d_bias)
    p, back = jax.vjp(s.features, _rows(s.queries, q_ref))
    do = _rows(s.queries, do_ref)
    rounded = p.astype(s.dtype).astype(jnp.float32)
    below = jnp.sum(rounded * total[...], axis=1, keepdims=True) + EPSILON
    dp = dot(do.astype(s.dtype), state[...], (1, 1)) / below
    d_below = jnp.sum(rounded * dp, axis=1, keepdims=True) / below
    (dq,) = back(dp - d_below * total[...])
    if add:
        dq += _rows(s.queries, add_ref)
    _write(s.queries, dq_ref, dq)
    # Behind the end do is zero, so the states get nothing.
    d_state[...] += sum(dot(rounded.astype(s.dtype), x, (0, 0)) for x in parts(do / below, s.dtype))
    d_total[...] -= jnp.sum(rounded * d_below, axis=0, keepdims=True)
    d_bias[...] += jnp.sum(do, axis=0, keepdims=True)


def _queries_back(s: _Sizes, q: Array, do: Array, add: Array | None, state: Array, total: Array):
    """``(dq + add, cotangents of S W and z, rowsum of do per key head)``."""
    body = functools.partial(_queries_back_body, s, add is not None)
    outputs = [q.dtype], [s.keys.width, 1, 1]
    (dq,), small = _call(s, body, s.queries, ([q, do, add], [state, total]), outputs, 2)
    return dq, *small


def _keys_back_body(s, add, k_ref, v_ref, *refs):
    adds, (d_state, d_total, dk_ref, dv_ref) = (refs[:2], refs[2:]) if add else ((), refs)
    p, back = jax.vjp(s.features, _rows(s.keys, k_ref))
    v = _rows(s.keys, v_ref).astype(s.dtype)
    found = [
        back(dot(v, d_state[...], (1, 1)) + d_total[...])[0],
        dot(p.astype(s.dtype), d_state[...], (1, 0)),
    ]
    if add:
        found = [x + _rows(s.keys, ref) for ref, x in zip(adds, found)]
    for ref, x in zip((dk_ref, dv_ref), found):
        _write(s.keys, ref, x)


def _keys_back(s: _Sizes, k: Array, v: Array, add: Any, d_state: Array, d_total: Array) -> Any:
    """``(dk, dv)``, added to ``add``."""
    body = functools.partial(_keys_back_body, s, add[0] is not None)
    inputs = [k, v, *add], [d_state, d_total]
    return _call(s, body, s.keys, inputs, ([k.dtype] * 2, []), 2)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def main(
    call: Call, q: Array, k: Array, v: Array, table: Array | None, params: Params | None
) -> Array:
    """As :func:`flora_jax.kernels.sla.linear.main`."""
    return _forward(call, q, k, v, table, params)[0]


def _forward(call, q, k, v, table, params):
    s, sparse, pull, bias = _sizes(call, q, k), None, None, None
    if table is not None:
        sparse, pull = jax.vjp(lambda *x: sparse_branch(call, *x, table), q, k, v)
        bias = params["bias"].astype(jnp.float32)[None]
    state, total = _states(s, k, v)
    mixed = project(state, params).astype(q.dtype)
    saved = q, k, v, params, table, pull, state, mixed, total
    return _mix(s, q, sparse, mixed, total, bias), saved


def _backward(call, saved, do):
    q, k, v, params, table, pull, state, mixed, total = saved
    s = _sizes(call, q, k)
    adds = (None,) * 3 if pull is None else pull(do)
    dq, d_mixed, d_total, d_bias = _queries_back(s, q, do, adds[0], mixed, total)
    _, back = jax.vjp(project, state, params)
    d_state, d_params = back(d_mixed)
    if params is not None:
        d_params["bias"] = d_bias.sum(axis=(0, 1, 2)).astype(params["bias"].dtype)
    dk, dv = _keys_back(s, k, v, adds[1:], d_state.astype(q.dtype), d_total)
    d_table = None if table is None else np.zeros(table.shape, jax.dtypes.float0)
    return dq, dk, dv, d_table, d_params


main.defvjp(_forward, _backward)
