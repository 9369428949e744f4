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

from flora_jax.kernels import costs, dispatch
from flora_jax.kernels.gated_linear_attention import tiles
from flora_jax.kernels.gated_linear_attention.chunks import Call, call_of, choose
from flora_jax.kernels.heads import Heads
from flora_jax.kernels.manual_axes import results

Features = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]] | None
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
    features: Features = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of :func:`flora_jax.kernels.gated_linear_attention.xla.xla`; with
    features (see the op) q and k come before them and g is None.

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
    call = call_of(q, k, v, k if features else g)
    if chunk is None:
        chunk = choose(call, costs.TPU, refusal=partial(_refusal, call), least=16)
    elif (reason := _refusal(call, chunk)) is not None:
        raise NotImplementedError(reason)
    how = How(scale=scale, chunk=chunk, features=features)
    return _attend(how, q, k, v, g, state)


def _refusal(call: Call, chunk: int) -> str | None:
    """Why the kernels cannot take a chunk, or None."""
    if chunk < 16:
        return f"chunk {chunk} is under 16"
    need = step_bytes(call.group, chunk, call.dim, call.value_dim)
    if need > VMEM:
        return f"a step of {chunk} tokens needs {need >> 20} MiB of VMEM of {VMEM >> 20}"
    return None


def step_bytes(group: int, chunk: int, dim: int, value_dim: int) -> int:
    """VMEM of a step of the backward kernel, roughly: blocks twice, scores and states."""
    lanes = lambda n: -(-n // 128) * 128
    dim, value_dim, wide = lanes(dim), lanes(value_dim), lanes(chunk)
    rows = chunk * (group * (4 * dim + 2 * value_dim) + 6 * dim + 3 * value_dim)
    return 4 * (2 * rows + 6 * group * chunk * wide + 8 * dim * value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    scale: float
    chunk: int
    features: Features = None


def operands(dtype: Any) -> tiles.Dot:
    if dtype == jnp.bfloat16:
        return tiles.Dot(jnp.bfloat16, jax.lax.Precision.DEFAULT)
    return tiles.EXACT


def once(rows: int, columns: int) -> pl.BlockSpec:
    """What a head has once, ``[B, H, rows, columns]``."""
    return pl.BlockSpec((1, 1, rows, columns), lambda b, h, c: (b, h, 0, 0))


def _call(
    body: Any, grid: tuple[int, ...], inputs: Any, outputs: Any, scratch: Any, flops: float
) -> tuple[jax.Array, ...]:
    """A kernel over ``(batch, head, chunk)``, chunks in order; inputs that are None are left out.

    Args:
      inputs: ``(array or None, BlockSpec)`` each.
      outputs: ``(shape, dtype, BlockSpec)`` each.
    """
    inputs = [(x, spec) for x, spec in inputs if x is not None]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    moved = sum(x.size * x.dtype.itemsize for x in [x for x, _ in inputs] + shapes)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=results(shapes, [x for x, _ in inputs]),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=int(flops), bytes_accessed=moved, transcendentals=0),
        interpret=dispatch.interpret_mode(),
    )(*[x for x, _ in inputs])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int
    heads: int
    group: int
    length: int
    chunk: int
    dim: int
    value_dim: int
    gate: int
    given: bool

    def _of(self, width: int, repeats: int = 1, numbers: bool = False) -> Heads:
        return Heads(
            batch=self.batch, tokens=self.length, key_heads=self.heads, repeats=repeats,
            width=width, block=self.chunk, numbers=numbers,
        )  # fmt: skip

    @property
    def queries(self) -> Heads:
        return self._of(self.dim, self.group)

    @property
    def keys(self) -> Heads:
        return self._of(self.dim)

    @property
    def values(self) -> Heads:
        return self._of(self.value_dim)

    @property
    def outputs(self) -> Heads:
        return self._of(self.value_dim, self.group)

    @property
    def gates(self) -> Heads:
        return self._of(self.gate, numbers=self.gate == 1)

    @property
    def gated(self) -> bool:
        return self.gate > 0

    @property
    def count(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.count

    @property
    def lead(self) -> tuple[int, int]:
        return self.batch, self.heads

    @property
    def flops(self) -> float:
        """Of the forward kernel: the levels, the scores' product with v, the state."""
        bits = self.chunk.bit_length() - 1 if self.gate > 1 else 1
        inside = 2 * self.chunk * (bits * self.dim + self.value_dim)
        across = 2 * self.dim * self.value_dim
        tokens = self.batch * self.heads * self.count * self.chunk
        return tokens * (self.group * (inside + across) + across)


def sizes_of(how: How, q: jax.Array, k: jax.Array, v: jax.Array, g: Any) -> Sizes:
    batch, length, heads, dim = k.shape
    return Sizes(
        batch=batch,
        heads=heads,
        group=q.shape[2] // heads,
        length=length,
        chunk=how.chunk,
        dim=dim,
        value_dim=v.shape[3],
        gate=dim if how.features else 0 if g is None else g.shape[3],
        given=g is not None,
    )


def prepared(
    how: How, s: Sizes, c: Any, q: jax.Array, k: jax.Array, g: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scaled queries, keys and log-decays of a chunk."""
    if how.features is not None:
        q, k, g = how.features(q, k)
        if s.length % s.chunk:
            # The features of what lies behind the end are not zero, and may be NaN.
            token = c * s.chunk + jax.lax.broadcasted_iota(jnp.int32, (s.chunk, 1), 0)
            q, k, g = (jnp.where(token < s.length, x, 0.0) for x in (q, k, g))
    return q * how.scale, k, g


def _forward_body(how, s, dot, *refs):
    q_ref, k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if s.given else None
    first_ref, out_ref, last_ref, state = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first_ref[0, 0]

    c = pl.program_id(2)
    g = s.gates.read(g_ref, c)[0] if s.given else None
    k, v = s.keys.read(k_ref, c)[0], s.values.read(v_ref, c)[0]
    q, k, g = prepared(how, s, c, s.queries.read(q_ref, c), k, g)
    out, new = tiles.forward(q, k, v, g, state[...], dot=dot)
    s.outputs.write(out_ref, out)
    state[...] = new
    last_ref[0, 0] = new


def _inputs(
    s: Sizes, at: Callable[..., Any], k: jax.Array, v: jax.Array, g: jax.Array | None
) -> list[tuple[Any, Any]]:
    """Keys, values and gates, None without, and their blocks."""
    arrays = [(k, s.keys), (v, s.values), (g, s.gates)]
    return [(None if x is None else heads.split(x), heads.group(at)) for x, heads in arrays]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, g, state):
    s, at = sizes_of(how, q, k, v, g), lambda *step: step
    out, last = _call(
        partial(_forward_body, how, s, operands(q.dtype)),
        s.grid,
        [
            (s.queries.split(q), s.queries.group(at)),
            *_inputs(s, at, k, v, g),
            (state.swapaxes(2, 3), once(s.value_dim, s.dim)),
        ],
        [
            (s.outputs.shape, q.dtype, s.outputs.group(at)),
            ((*s.lead, s.value_dim, s.dim), jnp.float32, once(s.value_dim, s.dim)),
        ],
        [pltpu.VMEM((s.value_dim, s.dim), jnp.float32)],
        s.flops,
    )
    return s.outputs.join(out), last.swapaxes(2, 3)


def _attend_forward(how, q, k, v, g, state):
    return _attend(how, q, k, v, g, state), (q, k, v, g, state)


def _states_body(how, s, dot, *refs):
    k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if s.given else None
    first_ref, before_ref, last_ref, state = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first_ref[0, 0]

    before_ref[0, 0, 0] = state[...]
    c = pl.program_id(2)
    g = s.gates.read(g_ref, c)[0] if s.given else None
    k, v = s.keys.read(k_ref, c)[0], s.values.read(v_ref, c)[0]
    _, k, g = prepared(how, s, c, k[None], k, g)
    new = tiles.update(state[...], k, v, tiles.decays(g, None, s.chunk), dot)
    state[...] = new
    last_ref[0, 0] = new


def states_before(how, s, dot, k, v, g, state):
    """The states before every chunk ``[B, H, n, V, K]``, and the last."""
    one = (s.value_dim, s.dim)
    return _call(
        partial(_states_body, how, s, dot),
        s.grid,
        [*_inputs(s, lambda *step: step, k, v, g), (state, once(*one))],
        [
            (
                (*s.lead, s.count, *one),
                jnp.float32,
                pl.BlockSpec((1, 1, 1, *one), lambda b, h, c: (b, h, c, 0, 0)),
            ),
            ((*s.lead, *one), jnp.float32, once(*one)),
        ],
        [pltpu.VMEM(one, jnp.float32)],
        s.batch * s.heads * s.count * s.chunk * 2 * s.dim * s.value_dim,
    )


def _backward_body(how, s, dot, *refs):
    q_ref, k_ref, v_ref, *refs = refs
    g_ref = refs.pop(0) if s.given else None
    before_ref, last_ref, do_ref, d_last_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    dg_ref = refs.pop(0) if s.given else None
    d_first_ref, d_state, *refs = refs
    later_ref = refs.pop(0) if s.gated else None
    c = s.count - 1 - pl.program_id(2)
    g = s.gates.read(g_ref, c)[0] if s.given else None

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_last_ref[0, 0]
        if s.gated:
            product = jnp.sum(last_ref[0, 0] * d_last_ref[0, 0], axis=0, keepdims=True)
            if s.gate == 1:
                product = jnp.sum(product, axis=1, keepdims=True)
            later_ref[...] = product

    q, k = s.queries.read(q_ref, c), s.keys.read(k_ref, c)[0]
    (q, k, g), pull = jax.vjp(partial(prepared, how, s, c), q, k, g)
    dq, dk, dv, dg, before, later = tiles.backward(
        q,
        k,
        s.values.read(v_ref, c)[0],
        g,
        before_ref[0, 0, 0],
        s.outputs.read(do_ref, c),
        d_state[...],
        later_ref[...] if s.gated else None,
        dot=dot,
    )
    dq, dk, dg = pull((dq, dk, dg))
    s.queries.write(dq_ref, dq)
    s.keys.write(dk_ref, dk[None])
    s.values.write(dv_ref, dv[None])
    d_state[...] = before
    d_first_ref[0, 0] = before
    if s.gated:
        later_ref[...] = later
    if s.given:
        s.gates.write(dg_ref, dg[None])


def _attend_backward(how, saved, cotangents):
    q, k, v, g, state = saved
    d_out, d_last = cotangents
    s, dot = sizes_of(how, q, k, v, g), operands(q.dtype)
    back = lambda b, h, c: (b, h, s.count - 1 - c)
    before, last = states_before(how, s, dot, k, v, g, state.swapaxes(2, 3))
    one = (s.value_dim, s.dim)
    chunk_state = pl.BlockSpec((1, 1, 1, *one), lambda *step: (*back(*step), 0, 0))
    scratch = [pltpu.VMEM(one, jnp.float32)]
    grads = [(q, s.queries), (k, s.keys), (v, s.values)]
    if s.gated:
        scratch.append(pltpu.VMEM((1, s.gate), jnp.float32))
    if s.given:
        grads.append((g, s.gates))
    *found, d_first = _call(
        partial(_backward_body, how, s, dot),
        s.grid,
        [
            (s.queries.split(q), s.queries.group(back)),
            *_inputs(s, back, k, v, g),
            (before, chunk_state),
            (last, once(*one)),
            (s.outputs.split(d_out), s.outputs.group(back)),
            (d_last.astype(jnp.float32).swapaxes(2, 3), once(*one)),
        ],
        [
            *((heads.shape, x.dtype, heads.group(back)) for x, heads in grads),
            ((*s.lead, *one), jnp.float32, once(*one)),
        ],
        scratch,
        3 * s.flops,
    )
    found = [heads.join(x) for x, (_, heads) in zip(found, grads)]
    dq, dk, dv, dg = found if s.given else (*found, None)
    return dq, dk, dv, dg, d_first.swapaxes(2, 3)


_attend.defvjp(_attend_forward, _attend_backward)
