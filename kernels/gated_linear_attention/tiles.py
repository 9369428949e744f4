"""The arithmetic of one chunk of one head, for every backend.

Inside a chunk of C tokens ``o_i = q_i S + sum_(j <= i) A_ij v_j`` with
``A_ij = sum_d q_id k_jd exp(l_(j+1)d + ... + l_id)``. Writing the decay as ``exp(b_i) exp(-b_j)``
overflows; so the pairs are split by halves. At the level of half size s the chunk is cut into
blocks of 2s; a query in the second half of a block sees the keys of its first half through the
block's middle m, ``exp(l_(m+1) + ... + l_i) exp(l_(j+1) + ... + l_m)``: no exponent is positive,
and every pair i > j belongs to exactly one level. A level is two products with the matrix unit: the
sums of decays (by a matrix of zeros and ones, so that nothing cancels) and the scores. log2(C)
levels and the diagonal make A.

The state is kept transposed, ``[V, K]``, so that decays per key channel lie along its last axis.
Queries are ``[G, C, K]``: the G heads that share keys. They come multiplied by the scale.
All arrays are float32; products use operands of ``dot.operand``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

FLOAT32 = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Dot:
    """Matrix products: operands cast to ``operand``, sums in float32."""

    operand: Any = jnp.float32
    precision: Any = FLOAT32

    def __call__(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        """``x`` and ``y`` (matrices) contracted over one axis each."""
        return jax.lax.dot_general(
            x.astype(self.operand),
            y.astype(self.operand),
            (((axes[0],), (axes[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


EXACT = Dot()


@dataclasses.dataclass(frozen=True)
class Keep:
    """What segments let through: 0 or 1.

    Args:
      pairs: ``[C, C]``, query and key in one segment.
      into: ``[C, 1]``, the token continues the state.
      out: ``[C, 1]``, the token is of the segment that the chunk ends in.
      carry: ``[1, 1]``, the state survives the chunk.
    """

    pairs: jax.Array
    into: jax.Array
    out: jax.Array
    carry: jax.Array


def keep_of(segments: jax.Array, before: jax.Array) -> Keep:
    """From segment numbers that never fall, ``[C]``, and the one before the chunk, ``[]``."""
    last = segments[-1]
    one = lambda x: x.astype(jnp.float32)
    return Keep(
        pairs=one(segments[:, None] == segments[None, :]),
        into=one(segments == before)[:, None],
        out=one(segments == last)[:, None],
        carry=one(last == before)[None, None],
    )


def _iota(chunk: int) -> tuple[jax.Array, jax.Array]:
    shape = (chunk, chunk)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def _ones(where: jax.Array) -> jax.Array:
    return jnp.where(where, 1.0, 0.0)


def levels(chunk: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Of every level: which decays a token sums ``[C, C]``, and its pairs ``[C, C]``, 0 or 1."""
    i, j = _iota(chunk)
    bits = chunk.bit_length() - 1
    for bit in reversed(range(bits)):
        half = 1 << bit
        block_i, block_j = i >> (bit + 1), j >> (bit + 1)
        middle = (block_i << (bit + 1)) + half
        same, late, early = block_i == block_j, i >= middle, i < middle
        # No select of booleans, which the TPU compiler refuses.
        summed = (late & (j > middle) & (j <= i)) | (early & (j > i) & (j <= middle))
        yield _ones(same & summed), _ones(same & late & (j < middle))


@dataclasses.dataclass(frozen=True)
class Decays:
    """Decay factors of a chunk; ``None`` stands for 1.

    Args:
      into: ``[C, K or 1]``, from the state before the chunk to a token.
      out: ``[C, K or 1]``, from a token to the state after the chunk.
      total: ``[1, K or 1]``, from the state before to the state after.
    """

    into: jax.Array | None
    out: jax.Array | None
    total: jax.Array | None


def decays(g: jax.Array | None, keep: Keep | None, chunk: int) -> Decays:
    """From log-decays ``[C, K or 1]``."""
    into = out = total = None
    if g is not None:
        i, j = _iota(chunk)
        into = jnp.exp(EXACT(_ones(j <= i), g, (1, 0)))
        out = jnp.exp(EXACT(_ones(j > i), g, (1, 0)))
        total = jnp.exp(jnp.sum(g, axis=0, keepdims=True))
    if keep is not None:
        into, out, total = (
            _times(a, b) for a, b in ((keep.into, into), (keep.out, out), (keep.carry, total))
        )
    return Decays(into, out, total)


def _times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    return x if factor is None else x * factor


def _rows(x: jax.Array) -> jax.Array:
    """``[G, C, K] -> [G C, K]``."""
    return x.reshape(-1, x.shape[-1])


def _masks(g: jax.Array | None, keep: Keep | None, chunk: int) -> Iterator[tuple]:
    """``(factor [C, K] or None, weight [C, C])`` whose sum of weighted scores is A but for the
    diagonal; for a gate of the whole head, or none, the weight carries the decay."""
    i, j = _iota(chunk)
    if g is None:
        terms = [(None, _ones(j < i))]
    elif g.shape[-1] == 1:
        between = jnp.zeros((chunk, chunk))
        for summed, pairs in levels(chunk):
            column = EXACT(summed, g, (1, 0))
            row = EXACT(g, summed, (0, 1))
            between = between + pairs * (column + row)
        terms = [(None, jnp.where(j < i, jnp.exp(between), 0.0))]
    else:
        terms = ((jnp.exp(EXACT(summed, g, (1, 0))), pairs) for summed, pairs in levels(chunk))
    for factor, weight in terms:
        yield factor, weight if keep is None else weight * keep.pairs


def scores(
    q: jax.Array, k: jax.Array, g: jax.Array | None, keep: Keep | None = None, dot: Dot = EXACT
) -> jax.Array:
    """A, ``[G, C, C]``: zero above the diagonal."""
    group, chunk, _ = q.shape
    i, j = _iota(chunk)
    total = jnp.where(i == j, jnp.sum(q * k, axis=-1, keepdims=True), 0.0)
    for factor, weight in _masks(g, keep, chunk):
        part = dot(_rows(_times(q, factor)), _times(k, factor), (1, 1))
        total = total + weight * part.reshape(group, chunk, chunk)
    return total


def update(
    state: jax.Array, k: jax.Array, v: jax.Array, decay: Decays, dot: Dot = EXACT
) -> jax.Array:
    """The state ``[V, K]`` after a chunk."""
    return _times(state, decay.total) + dot(v, _times(k, decay.out), (0, 0))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    state: jax.Array,
    keep: Keep | None = None,
    dot: Dot = EXACT,
) -> tuple[jax.Array, jax.Array]:
    """One chunk.

    Args:
      q: ``[G, C, K]``, scaled.
      k, v: ``[C, K]`` and ``[C, V]``.
      g: ``[C, K]``, ``[C, 1]`` or None.
      state: ``[V, K]`` before the chunk.

    Returns:
      ``o [G, C, V]`` and the state after the chunk.
    """
    group, chunk, _ = q.shape
    decay = decays(g, keep, chunk)
    out = dot(_rows(scores(q, k, g, keep, dot)), v, (1, 0))
    out = out + dot(_rows(_times(q, decay.into)), state, (1, 1))
    return out.reshape(group, chunk, -1), update(state, k, v, decay, dot)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    state: jax.Array,
    d_out: jax.Array,
    d_state: jax.Array,
    later: jax.Array | None,
    keep: Keep | None = None,
    dot: Dot = EXACT,
) -> tuple[jax.Array | None, ...]:
    """The cotangents of :func:`forward`, chunks taken from the last to the first.

    A decay touches every term that crosses it, so that its cotangent is
    ``sum_(s >= t) (q dq - k dk)_s`` up to the chunk's end and, for all that comes later,
    ``later = sum_V state_after d_state_after``.

    Args:
      state: before the chunk.
      d_out: ``[G, C, V]``.
      d_state: ``[V, K]``, of the state after the chunk.
      later: ``[1, K]`` or ``[1, 1]``; None without a gate.

    Returns:
      Cotangents of q, k, v and g, of the state before the chunk, and ``later`` for the chunk
      before.
    """
    group, chunk, _ = q.shape
    decay = decays(g, keep, chunk)
    do = _rows(d_out)
    d_scores = dot(do, v, (1, 1)).reshape(group, chunk, chunk)
    dq = _times(dot(do, state, (1, 0)).reshape(q.shape), decay.into)
    dk = _times(dot(v, d_state, (1, 0)), decay.out)
    dv = dot(_times(k, decay.out), d_state, (1, 1))
    attention = 0.0
    for factor, weight in _masks(g, keep, chunk):
        left, right = _rows(_times(q, factor)), _times(k, factor)
        attention = attention + weight * dot(left, right, (1, 1)).reshape(d_scores.shape)
        moved = _rows(weight * d_scores)
        dq = dq + _times(dot(moved, right, (1, 0)).reshape(q.shape), factor)
        dk = dk + _times(dot(moved, left, (0, 0)), factor)
    dv = dv + dot(_rows(attention), do, (0, 0))
    before = _times(d_state, decay.total) + dot(do, _rows(_times(q, decay.into)), (0, 0))
    dg = earlier = None
    if g is not None:
        axes = (0,) if g.shape[-1] > 1 else (0, 1)
        i, j = _iota(chunk)
        change = jnp.sum(q * dq, axis=0) - k * dk
        if len(axes) > 1:
            change = jnp.sum(change, axis=1, keepdims=True)
        dg = EXACT(_ones(j >= i), change, (1, 0)) + later
        earlier = jnp.sum(state * before, axis=axes, keepdims=True)
    # The diagonal touches no decay.
    own = jnp.sum(d_out * v, axis=-1, keepdims=True)
    dv = dv + jnp.sum(jnp.sum(q * k, axis=-1, keepdims=True) * d_out, axis=0)
    return dq + own * k, dk + jnp.sum(own * q, axis=0), dv, dg, before, earlier
