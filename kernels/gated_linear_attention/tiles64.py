"""The arithmetic of one chunk of 64 tokens in tiles of 64 x 64, for Hopper's matrix unit.

The pairs of a chunk are split by halves as in :mod:`tiles`. Here a level is three products of tiles
and all of them fit one warpgroup. At a level every token is either late, and then its query counts,
or early, and then its key does. So one tile ``z = f * (late ? q : k)`` holds all that the level
needs: the scores are the late rows and early columns of ``z z^T``, and with the symmetric matrix H
of the scores' cotangents ``H z`` is the cotangent of late queries and early keys at once.

The sums of log-decays, and the cotangent of the decays, are products of 0/1 matrices with float32
numbers, which the matrix unit does not take: a number goes in as two of bfloat16 whose sum has 16
bits, an error of 2^-17 of an exponent. All terms of such a sum have one sign, and no exponent is
positive.

Heads of 128 are two tiles; a warpgroup has one tile of the key channels, and one of the value
channels. What it computes before they meet is a function of its own here, and so is what follows.

Functions take a machine: ``index`` (row and column numbers of a tile), ``product`` (a float32 sum
of products of pairs of tiles), ``turn`` (a stored tile transposed), ``read`` (a stored tile in
float32), ``write`` (which rounds to bfloat16), ``along`` (a stored vector along columns) and
``loop``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SIDE = 64
TILE = 2 * SIDE * SIDE
"""Bytes of a tile of bfloat16."""
PRODUCT = 2 * SIDE**3
"""Operations of a product of two tiles."""
LEVELS = SIDE.bit_length() - 1


def halves(i: Array, j: Array, bit: Any) -> tuple[Array, Array, Array]:
    """Of the level of half size ``2 ** bit``: the late rows, which decays a row sums, and where
    rows meet columns, both of one block of two halves and of different halves.

    Args:
      i, j: row and column numbers.
    """
    middle = ((i >> (bit + 1)) << (bit + 1)) + (1 << bit)
    summed = (j > jnp.minimum(i, middle)) & (j <= jnp.maximum(i, middle))
    return i >= middle, summed, ((i ^ j) >> bit) == 1


def spread(rows: Array) -> Array:
    """A number per row along the columns."""
    return jax.lax.broadcast_in_dim(rows, (SIDE, SIDE), [0])


def _ones(where: Array) -> Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def _only(where: Array, x: Array) -> Array:
    return jnp.where(where, x, 0.0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Float32 numbers as two stored bfloat16 tiles whose sum they are, to 16 bits."""

    high: Any
    low: Any

    def write(self, m: Any, x: Array) -> None:
        high, low = _parts(x)
        m.write(self.high, high)
        m.write(self.low, low)

    def sums(self, m: Any, where: Array) -> Array:
        """``where @ x`` for a 0/1 matrix."""
        ones = _ones(where)
        return m.product((ones, self.high), (ones, self.low))


def _parts(x: Array) -> tuple[Array, Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class ChannelGate:
    """A decay per key channel: the logarithms of 64 channels."""

    logs: Pair

    def decay(self, m: Any, where: Array) -> Array:
        """The decay over the tokens that a row of a 0/1 matrix names, ``[64, 64]``."""
        return jnp.exp(self.logs.sums(m, where))


@dataclasses.dataclass(frozen=True)
class HeadGate:
    """A decay for all channels: a stored vector of logarithms."""

    logs: Any

    def decay(self, m: Any, where: Array) -> Array:
        return jnp.exp(spread(jnp.sum(_only(where, m.along(self.logs)), axis=1)))

    def between(self, m: Any, room: Any) -> Array:
        """Decay from token j to token i, for ``j <= i``: again a sum, no difference."""
        i, j = m.index
        m.write(room, _ones(i > j))
        return jnp.exp(m.product(*((x, room) for x in _parts(_only(j <= i, m.along(self.logs))))))


@dataclasses.dataclass(frozen=True)
class NoGate:
    """No decay."""

    def decay(self, m: Any, where: Array) -> float:
        return 1.0

    def between(self, m: Any, room: Any) -> float:
        return 1.0


Gate = ChannelGate | HeadGate | NoGate


def into(m: Any, gate: Gate) -> Array | float:
    """Decay from the state before the chunk to each token."""
    i, j = m.index
    return gate.decay(m, j <= i)


def out(m: Any, gate: Gate) -> Array | float:
    """Decay from each token to the state after the chunk."""
    i, j = m.index
    return gate.decay(m, j > i)


def total(m: Any, gate: Gate) -> Array | float:
    """Decay over the chunk, the same in all rows."""
    i, _ = m.index
    return gate.decay(m, i >= 0)


def level(
    m: Any, bit: Any, q: Any, k: Any, gate: ChannelGate, z: Any
) -> tuple[Array, Array, Array, Array]:
    """``(late, meet, f, z z^T)``; z stays stored."""
    late, summed, meet = halves(*m.index, bit)
    f = gate.decay(m, summed)
    m.write(z, jnp.where(late, m.read(q), m.read(k)) * f)
    return late, meet, f, m.product((z, m.turn(z)))


def scores(m: Any, q: Any, k: Any, gate: Gate, z: Any) -> Array:
    """The part of A that 64 key channels give."""
    i, j = m.index
    if not isinstance(gate, ChannelGate):
        return _only(j <= i, m.product((q, m.turn(k))) * gate.between(m, z))

    def step(bit: Any, a: Array) -> Array:
        _, meet, _, products = level(m, bit, q, k, gate, z)
        return jnp.where(meet, products, a)

    a = spread(jnp.sum(m.read(q) * m.read(k), axis=1))
    return _only(j <= i, m.loop(LEVELS, step, a))


def forward(m: Any, q: Any, k: Any, gate: Gate, z: Any) -> None:
    """Before the warpgroups meet: leaves decayed queries in ``q`` and the part of A in ``z``."""
    a = scores(m, q, k, gate, z)
    m.write(q, m.read(q) * into(m, gate))
    m.write(z, a)


def outputs(
    m: Any, qs: Sequence[Any], parts: Sequence[Any], v: Any, states: Sequence[Any], scale: float
) -> Array:
    """``o [64, 64]`` of 64 value channels.

    Args:
      qs: decayed queries, a tile per 64 key channels.
      parts: of A, likewise.
      v: the values.
      states: before the chunk, ``[V, K]``, a tile per 64 key channels.
    """
    pairs = [(q, m.turn(state)) for q, state in zip(qs, states)]
    return m.product(*pairs, *((a, v) for a in parts)) * scale


def update(
    m: Any, state: Array, x: Any, y: Any, gate: Gate, decay: Any, scale: float, room: Any
) -> Array:
    """The state ``[V, K]`` after a chunk, or its cotangent before it.

    Args:
      x, y: keys and values; for the cotangent queries and the output's.
      decay: :func:`out`; for the cotangent :func:`into`.
      scale: 1; for the cotangent that of the scores.
      room: a tile to store the decayed x in.
    """
    m.write(room, m.read(x) * decay(m, gate) * scale)
    return m.product((m.turn(y), room), start=state * total(m, gate))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Stored tiles of the gradient of a chunk for 64 key channels.

    Args:
      q, k: of these channels; a warpgroup's own.
      vs, dos: values and cotangents of the output, all tiles.
      states, d_states: before the chunk and cotangent after it, ``[V, K]``, a tile per 64 value
        channels.
      z, keys: room for a tile each.
    """

    q: Any
    k: Any
    vs: Sequence[Any]
    dos: Sequence[Any]
    states: Sequence[Any]
    d_states: Sequence[Any]
    z: Any
    keys: Any


def _inside(m: Any, c: Chunk, gate: Gate, below: Array, scale: float) -> tuple[Array, ...]:
    """What pairs give of ``(A, dq, dk)``; A with its diagonal, the others without.

    Args:
      below: cotangents of the scores, true below the diagonal.
    """
    i, j = m.index
    if not isinstance(gate, ChannelGate):
        between = gate.between(m, c.z)
        m.write(c.z, _only(j < i, below * between))
        dq, dk = m.product((c.z, c.k)), m.product((m.turn(c.z), c.q))
        return m.product((c.q, m.turn(c.k))) * between, dq, dk
    above = m.product(*((v, m.turn(do)) for do, v in zip(c.dos, c.vs))) * scale
    d_scores = jnp.where(i > j, below, above).astype(jnp.bfloat16)

    def step(bit: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        a, dq, dk, d_scores = carry
        late, meet, f, products = level(m, bit, c.q, c.k, gate, c.z)
        a = jnp.where(meet, products, a)
        here = _only(meet, d_scores.astype(jnp.float32)).astype(jnp.bfloat16)
        moved = m.product((here, c.z)) * f
        return a, dq + _only(late, moved), dk + jnp.where(late, 0.0, moved), d_scores

    a = spread(jnp.sum(m.read(c.q) * m.read(c.k), axis=1))
    zero = jnp.zeros_like(a)
    return m.loop(LEVELS, step, (a, zero, zero, d_scores))[:3]


def gradient(
    m: Any, c: Chunk, gate: Gate, room: Pair, scale: float
) -> tuple[Array, Array, Array | None]:
    """Before the warpgroups meet: ``(dq, dk, dg)``; dg a column per channel, or per head, whose
    columns' sum it is.

    Leaves the part of A, times the scale, in ``z`` and the keys as the state takes them in
    ``keys``.

    Args:
      room: two tiles; a channel gate's own logarithms, which are overwritten.
    """
    i, j = m.index
    below = m.product(*((do, m.turn(v)) for do, v in zip(c.dos, c.vs))) * scale
    own = jnp.sum(_only(i == j, below), axis=1)
    a, dq, dk = _inside(m, c, gate, below, scale)
    m.write(c.z, _only(j <= i, a) * scale)
    dq = dq + m.product(*zip(c.dos, c.states)) * into(m, gate) * scale
    factor = out(m, gate)
    dk_state = m.product(*zip(c.vs, c.d_states)) * factor
    m.write(c.keys, m.read(c.k) * factor)
    dg = None
    if not isinstance(gate, NoGate):
        carried = sum(m.read(s) * m.read(d) for s, d in zip(c.states, c.d_states))
        dg = _decay_gradient(m, c, room, dq, dk, dk_state, carried * total(m, gate))
    # The diagonal touches no decay.
    dq = dq + spread(own) * m.read(c.k)
    dk = dk + dk_state + spread(own) * m.read(c.q)
    return dq, dk, dg


def _decay_gradient(
    m: Any, c: Chunk, room: Pair, dq: Array, dk: Array, dk_state: Array, carried: Array
) -> Array:
    """A decay touches the terms that cross it: within the chunk those of later queries less those
    of later keys, into the next chunk those of earlier keys and of the state before."""
    i, j = m.index
    room.write(m, m.read(c.q) * dq - m.read(c.k) * dk)
    dg = room.sums(m, j >= i)
    room.write(m, m.read(c.k) * dk_state)
    dg = dg + room.sums(m, j < i)
    room.write(m, carried)
    return dg + room.sums(m, i >= 0)


def value_gradient(
    m: Any, parts: Sequence[Any], do: Any, keys: Sequence[Any], d_states: Sequence[Any]
) -> Array:
    """``dv [64, 64]`` of 64 value channels.

    Args:
      parts: of A, times the scale, a tile per 64 key channels.
      do: the output's cotangent.
      keys: as the state takes them, likewise.
      d_states: of the state after the chunk, ``[V, K]``, likewise.
    """
    pairs = [(k, m.turn(d)) for k, d in zip(keys, d_states)]
    return m.product(*((m.turn(a), do) for a in parts), *pairs)
