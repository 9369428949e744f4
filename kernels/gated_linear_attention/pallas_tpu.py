"""Pallas for TPU: a chunk a grid step, the state of a head in VMEM from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import dispatch
from flora_jax.kernels.gated_linear_attention import tiles

CHUNK = 64
VMEM = 96 * 2**20
"""Bytes of VMEM that one kernel may ask for."""


def pallas_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    state: jax.Array,
    segments: jax.Array | None,
    *,
    scale: float,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of :func:`flora_jax.kernels.gated_linear_attention.xla.xla`.

    Raises:
      NotImplementedError: segments, a single token, a chunk under 16, dtypes other than float32
        and bfloat16, or heads so large that a step does not fit the VMEM.
    """
    if segments is not None:
        raise NotImplementedError("segments")
    if q.shape[1] == 1:
        raise NotImplementedError("a single token")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"dtype {q.dtype}")
    chunk = chunk or CHUNK
    if chunk < 16:
        raise NotImplementedError(f"chunk {chunk} is under 16")
    group = q.shape[2] // k.shape[2]
    need = step_bytes(group, chunk, q.shape[3], v.shape[3])
    if need > VMEM:
        raise NotImplementedError(f"a step needs {need >> 20} MiB of VMEM of {VMEM >> 20}")
    how = _How(scale=scale, chunk=chunk)
    return _attend(how, q, k, v, g, state)


def step_bytes(group: int, chunk: int, dim: int, value_dim: int) -> int:
    """VMEM of a step of the backward kernel, roughly: blocks twice, scores and states."""
    lanes = lambda n: -(-n // 128) * 128
    dim, value_dim, wide = lanes(dim), lanes(value_dim), lanes(chunk)
    rows = chunk * (group * (4 * dim + 2 * value_dim) + 6 * dim + 3 * value_dim)
    return 4 * (2 * rows + 6 * group * chunk * wide + 8 * dim * value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    scale: float
    chunk: int


def _dot(dtype: Any) -> tiles.Dot:
    if dtype == jnp.bfloat16:
        return tiles.Dot(jnp.bfloat16, jax.lax.Precision.DEFAULT)
    return tiles.EXACT


def _flat(dim: int) -> bool:
    """Heads that are whole lanes stay side by side, ``[B, T', N D]``, as a projection leaves them:
    a block is the columns of the heads that share keys, and nothing is copied into another order.
    """
    return dim % 128 == 0


def _split(x: jax.Array | None, chunk: int, heads: int) -> jax.Array | None:
    """``[B, T, N, D] -> [B, T', N D]`` or ``[B, H, N/H, T', D]``, with zeros behind the end."""
    if x is None:
        return None
    batch, length, all_heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    if _flat(dim):
        return x.reshape(batch, x.shape[1], all_heads * dim)
    x = x.reshape(batch, x.shape[1], heads, all_heads // heads, dim)
    return x.transpose(0, 2, 3, 1, 4)


def _join(x: jax.Array, length: int, heads: int) -> jax.Array:
    """The inverse of :func:`_split`; ``heads`` are all of them."""
    if x.ndim == 3:
        return x.reshape(*x.shape[:2], heads, -1)[:, :length]
    batch, _, _, padded, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, dim)[:, :length]


def _rows(group: int, chunk: int, dim: int, at: Callable[[Any], Any]) -> pl.BlockSpec:
    """A chunk's rows of what :func:`_split` gives; ``at`` maps a grid step to the chunk."""
    if _flat(dim):
        return pl.BlockSpec((1, chunk, group * dim), lambda b, h, c: (b, at(c), h))
    return pl.BlockSpec((1, 1, group, chunk, dim), lambda b, h, c: (b, h, 0, at(c), 0))


def _head(rows: int, columns: int) -> pl.BlockSpec:
    """What a head has once, ``[B, H, rows, columns]``."""
    return pl.BlockSpec((1, 1, rows, columns), lambda b, h, c: (b, h, 0, 0))


def _call(
    body: Any, grid: tuple[int, ...], inputs: Any, outputs: Any, scratch: Any, flops: float
) -> tuple[jax.Array, ...]:
    """A kernel over ``(batch, head, chunk)``, chunks in order; inputs that are None are left out.

    Args:
      inputs: ``(array or None, BlockSpec)`` each.
      outputs: ``(shape, dtype, BlockSpec)`` each, or None.
    """
    inputs = [(x, spec) for x, spec in inputs if x is not None]
    outputs = [o for o in outputs if o is not None]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    moved = sum(x.size * x.dtype.itemsize for x in [x for x, _ in inputs] + shapes)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=int(flops), bytes_accessed=moved, transcendentals=0),
        interpret=dispatch.interpret_mode(),
    )(*[x for x, _ in inputs])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    batch: int
    heads: int
    group: int
    length: int
    chunk: int
    dim: int
    value_dim: int
    gate: int

    @property
    def count(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.count

    @property
    def lead(self) -> tuple[int, int]:
        return self.batch, self.heads

    def array(self, group: int, dim: int) -> tuple[int, ...]:
        """The shape that :func:`_split` gives."""
        padded = self.count * self.chunk
        if _flat(dim):
            return self.batch, padded, self.heads * group * dim
        return self.batch, self.heads, group, padded, dim

    @property
    def flops(self) -> float:
        """Of the forward kernel: the levels, the scores' product with v, the state."""
        bits = self.chunk.bit_length() - 1 if self.gate > 1 else 1
        inside = 2 * self.chunk * (bits * self.dim + self.value_dim)
        across = 2 * self.dim * self.value_dim
        tokens = self.batch * self.heads * self.count * self.chunk
        return tokens * (self.group * (inside + across) + across)


def _sizes(how: _How, q: jax.Array, k: jax.Array, v: jax.Array, g: Any) -> _Sizes:
    batch, length, heads, dim = k.shape
    return _Sizes(
        batch=batch,
        heads=heads,
        group=q.shape[2] // heads,
        length=length,
        chunk=how.chunk,
        dim=dim,
        value_dim=v.shape[3],
        gate=0 if g is None else g.shape[3],
    )


def _read(ref: Any, group: int = 1) -> jax.Array:
    """``[G, C, D]`` of rows, else what a head has."""
    if len(ref.shape) != 3:
        return ref[0, 0].astype(jnp.float32)
    return jnp.stack([ref[0, :, at].astype(jnp.float32) for at in _columns(ref, group)])


def _write(ref: Any, x: jax.Array) -> None:
    """``[G, C, D]`` into rows."""
    if len(ref.shape) != 3:
        ref[0, 0] = x.astype(ref.dtype)
        return
    for at, part in zip(_columns(ref, len(x)), x):
        ref[0, :, at] = part.astype(ref.dtype)


def _columns(ref: Any, group: int) -> list[slice]:
    dim = ref.shape[2] // group
    return [slice(i * dim, (i + 1) * dim) for i in range(group)]


def _forward_body(how, dot, group, gated, *refs):
    q_ref, k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if gated else None
    first_ref, out_ref, last_ref, state = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = _read(first_ref)

    g = _read(g_ref)[0] if gated else None
    out, new = tiles.forward(
        _read(q_ref, group) * how.scale, _read(k_ref)[0], _read(v_ref)[0], g, state[...], dot=dot
    )
    _write(out_ref, out)
    state[...] = new
    last_ref[0, 0] = new


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, g, state):
    s = _sizes(how, q, k, v, g)
    rows = partial(_rows, at=lambda c: c)
    split = lambda x: _split(x, s.chunk, s.heads)
    key, value = rows(1, s.chunk, s.dim), rows(1, s.chunk, s.value_dim)
    out = s.array(s.group, s.value_dim)
    out, last = _call(
        partial(_forward_body, how, _dot(q.dtype), s.group, g is not None),
        s.grid,
        [
            (split(q), rows(s.group, s.chunk, s.dim)),
            (split(k), key),
            (split(v), value),
            (split(g), rows(1, s.chunk, s.gate)),
            (state.swapaxes(2, 3), _head(s.value_dim, s.dim)),
        ],
        [
            (out, q.dtype, rows(s.group, s.chunk, s.value_dim)),
            ((*s.lead, s.value_dim, s.dim), jnp.float32, _head(s.value_dim, s.dim)),
        ],
        [pltpu.VMEM((s.value_dim, s.dim), jnp.float32)],
        s.flops,
    )
    return _join(out, s.length, q.shape[2]), last.swapaxes(2, 3)


def _attend_forward(how, q, k, v, g, state):
    return _attend(how, q, k, v, g, state), (q, k, v, g, state)


def _states_body(how, dot, gated, *refs):
    k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if gated else None
    first_ref, before_ref, last_ref, state = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = _read(first_ref)

    before_ref[0, 0, 0] = state[...]
    g = _read(g_ref)[0] if gated else None
    decay = tiles.decays(g, None, how.chunk)
    new = tiles.update(state[...], _read(k_ref)[0], _read(v_ref)[0], decay, dot)
    state[...] = new
    last_ref[0, 0] = new


def _states(how, s, dot, k, v, g, state):
    """The states before every chunk ``[B, H, n, V, K]``, and the last."""
    rows = partial(_rows, at=lambda c: c)
    one = (s.value_dim, s.dim)
    return _call(
        partial(_states_body, how, dot, g is not None),
        s.grid,
        [
            (k, rows(1, s.chunk, s.dim)),
            (v, rows(1, s.chunk, s.value_dim)),
            (g, rows(1, s.chunk, s.gate)),
            (state, _head(*one)),
        ],
        [
            (
                (*s.lead, s.count, *one),
                jnp.float32,
                pl.BlockSpec((1, 1, 1, *one), lambda b, h, c: (b, h, c, 0, 0)),
            ),
            ((*s.lead, *one), jnp.float32, _head(*one)),
        ],
        [pltpu.VMEM(one, jnp.float32)],
        s.batch * s.heads * s.count * s.chunk * 2 * s.dim * s.value_dim,
    )


def _backward_body(how, dot, group, gated, *refs):
    q_ref, k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if gated else None
    before_ref, last_ref, do_ref, d_last_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    dg_ref = refs.pop(0) if gated else None
    d_first_ref, d_state, *refs = refs
    later_ref = refs.pop(0) if gated else None
    g = _read(g_ref)[0] if gated else None

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = _read(d_last_ref)
        if gated:
            product = jnp.sum(_read(last_ref) * _read(d_last_ref), axis=0, keepdims=True)
            if g.shape[1] == 1:
                product = jnp.sum(product, axis=1, keepdims=True)
            later_ref[...] = product

    dq, dk, dv, dg, before, later = tiles.backward(
        _read(q_ref, group) * how.scale,
        _read(k_ref)[0],
        _read(v_ref)[0],
        g,
        before_ref[0, 0, 0],
        _read(do_ref, group),
        d_state[...],
        later_ref[...] if gated else None,
        dot=dot,
    )
    for ref, x in ((dq_ref, dq * how.scale), (dk_ref, dk[None]), (dv_ref, dv[None])):
        _write(ref, x)
    d_state[...] = before
    d_first_ref[0, 0] = before
    if gated:
        _write(dg_ref, dg[None])
        later_ref[...] = later


def _attend_backward(how, saved, cotangents):
    q, k, v, g, state = saved
    d_out, d_last = cotangents
    s, dot = _sizes(how, q, k, v, g), _dot(q.dtype)
    split = lambda x: _split(x, s.chunk, s.heads)
    back = partial(_rows, at=lambda c: s.count - 1 - c)
    ks, vs, gs = split(k), split(v), split(g)
    before, last = _states(how, s, dot, ks, vs, gs, state.swapaxes(2, 3))
    query, key = back(s.group, s.chunk, s.dim), back(1, s.chunk, s.dim)
    value, gate = back(1, s.chunk, s.value_dim), back(1, s.chunk, s.gate)
    one = (s.value_dim, s.dim)
    chunk_state = pl.BlockSpec((1, 1, 1, *one), lambda b, h, c: (b, h, s.count - 1 - c, 0, 0))
    scratch = [pltpu.VMEM(one, jnp.float32)]
    if g is not None:
        scratch.append(pltpu.VMEM((1, s.gate), jnp.float32))
    *grads, d_first = _call(
        partial(_backward_body, how, dot, s.group, g is not None),
        s.grid,
        [
            (split(q), query),
            (ks, key),
            (vs, value),
            (gs, gate),
            (before, chunk_state),
            (last, _head(*one)),
            (split(d_out), back(s.group, s.chunk, s.value_dim)),
            (d_last.astype(jnp.float32).swapaxes(2, 3), _head(*one)),
        ],
        [
            (s.array(s.group, s.dim), q.dtype, query),
            (s.array(1, s.dim), k.dtype, key),
            (s.array(1, s.value_dim), v.dtype, value),
            None if g is None else (s.array(1, s.gate), g.dtype, gate),
            ((*s.lead, *one), jnp.float32, _head(*one)),
        ],
        scratch,
        3 * s.flops,
    )
    heads = (q.shape[2], *[s.heads] * 3)
    grads = [_join(x, s.length, n) for x, n in zip(grads, heads)]
    dq, dk, dv = grads[:3]
    return dq, dk, dv, None if g is None else grads[3], d_first.swapaxes(2, 3)


_attend.defvjp(_attend_forward, _attend_backward)
