"""An exact simulator: a state of n qubits is an array of amplitudes ``[2] * n``.

Qubit 0 is the first axis, the most significant bit. Nothing is sampled and nothing has noise. Every
function is pure jax.numpy: batch with ``jax.vmap``, differentiate with ``jax.grad``, choose the
precision by the dtypes of state and angles (complex64, complex128). H, RY, CNOT and CZ are real: a
circuit of these alone may start from a real state and stays real, at half the cost.

Example (the Bell state (|00> + |11>) / sqrt(2)):
    >>> bell = cnots(apply(zero_state(2), hadamard(), 0), ((0, 1),))
    >>> jnp.round(probabilities(bell), 4).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError

Pairs = tuple[tuple[int, int], ...]
GROUP = 4  # qubits that one matrix product of a layer takes: its Kronecker product is 16 x 16
EXACT = jax.lax.Precision.HIGHEST  # accelerators round the inputs of products by default


def zero_state(qubits: int, dtype: jax.typing.DTypeLike = jnp.complex64) -> jax.Array:
    """``|0...0>``, ``[2] * qubits``."""
    return jnp.zeros((2,) * qubits, dtype).at[(0,) * qubits].set(1)


def hadamard(dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """``[[1, 1], [1, -1]] / sqrt(2)``."""
    return jnp.array([[1, 1], [1, -1]], dtype) / np.sqrt(2).astype(np.dtype(dtype))


def rx(angle: jax.typing.ArrayLike) -> jax.Array:
    """``exp(-i angle X / 2)``, complex: angles ``[...]`` to gates ``[..., 2, 2]``."""
    c, s = _half(angle)
    return _gate(c + 0j, -1j * s, -1j * s, c + 0j)


def ry(angle: jax.typing.ArrayLike) -> jax.Array:
    """``exp(-i angle Y / 2)``, real: angles ``[...]`` to gates ``[..., 2, 2]``."""
    c, s = _half(angle)
    return _gate(c, -s, s, c)


def rz(angle: jax.typing.ArrayLike) -> jax.Array:
    """``exp(-i angle Z / 2)``, complex: angles ``[...]`` to gates ``[..., 2, 2]``."""
    c, s = _half(angle)
    zero = jnp.zeros_like(c) + 0j
    return _gate(c - 1j * s, zero, zero, c + 1j * s)


def rotation(angles: jax.typing.ArrayLike) -> jax.Array:
    """``RZ(g) RY(b) RZ(a)``, any turn of one qubit: ``(a, b, g) [..., 3]`` to ``[..., 2, 2]``."""
    a, b, g = jnp.moveaxis(jnp.asarray(angles), -1, 0)
    c, s = _half(b)
    both, apart = jnp.exp(0.5j * (a + g)), jnp.exp(0.5j * (a - g))
    return _gate(c / both, -s * apart, s / apart, c * both)


def apply(state: jax.Array, gate: jax.Array, qubit: int) -> jax.Array:
    """A gate ``[2, 2]`` on one qubit.

    Raises:
      ConfigError: there is no such qubit.
    """
    _check(state, (qubit,))
    out = jnp.tensordot(gate, state, axes=((1,), (qubit,)), precision=EXACT)
    return jnp.moveaxis(out, 0, qubit)


def layer(state: jax.Array, gates: jax.Array) -> jax.Array:
    """Gate i on qubit i for every qubit, ``gates [n, 2, 2]``.

    A few products with Kronecker products of ``GROUP`` gates: far less to compile, and faster, than
    a product for each qubit.

    Raises:
      ConfigError: not one gate a qubit.
    """
    n = state.ndim
    if gates.shape[0] != n:
        raise ConfigError(f"a layer on {n} qubits needs {n} gates, got {gates.shape[0]}")
    for start in range(0, n, GROUP):
        both = functools.reduce(jnp.kron, [gates[i] for i in range(start, min(start + GROUP, n))])
        # The front axes go to the back: after all groups the order is the first one again.
        state = jnp.matmul(both, state.reshape(len(both), -1), precision=EXACT).T
    return state.reshape((2,) * n)


def cnots(state: jax.Array, pairs: Pairs) -> jax.Array:
    """CNOT of every ``(control, target)`` in turn: together one permutation of the amplitudes.

    Raises:
      ConfigError: there is no such qubit, or a qubit would control itself.
    """
    for pair in pairs:
        _check(state, pair)
    flat = state.reshape(-1).at[_permutation(state.ndim, tuple(pairs))]
    return flat.get(unique_indices=True, mode="promise_in_bounds").reshape(state.shape)


def cz(state: jax.Array, first: int, second: int) -> jax.Array:
    """The controlled Z: the sign of the amplitudes where both qubits are 1.

    Raises:
      ConfigError: there is no such qubit, or both are one.
    """
    _check(state, (first, second))
    index = [slice(None)] * state.ndim
    index[first] = index[second] = 1
    signs = np.ones(state.shape, np.dtype(state.dtype).char)
    signs[tuple(index)] = -1
    return state * signs


def probabilities(state: jax.Array) -> jax.Array:
    """``|amplitude|^2``, real ``[2] * n``."""
    return jnp.real(state) ** 2 + jnp.imag(state) ** 2 if _complex(state) else state**2


def expect_z(state: jax.Array, qubits: Sequence[int]) -> jax.Array:
    """``<Z>`` of some qubits, real ``[len(qubits)]`` in [-1, 1].

    Raises:
      ConfigError: there is no such qubit.
    """
    p = probabilities(state)
    found = []
    for qubit in qubits:
        _check(state, (qubit,))
        zero, one = p.sum([axis for axis in range(p.ndim) if axis != qubit])
        found.append(zero - one)
    return jnp.stack(found)


def _half(angle: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    half = 0.5 * jnp.asarray(angle)
    return jnp.cos(half), jnp.sin(half)


def _gate(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.stack([jnp.stack([a, b], axis=-1), jnp.stack([c, d], axis=-1)], axis=-2)


def _complex(state: jax.Array) -> bool:
    return jnp.issubdtype(state.dtype, jnp.complexfloating)


def _check(state: jax.Array, qubits: Sequence[int]) -> None:
    for qubit in qubits:
        if not 0 <= qubit < state.ndim:
            raise ConfigError(f"qubit {qubit} is outside 0..{state.ndim - 1}")
    if len(set(qubits)) < len(qubits):
        raise ConfigError(f"a gate on two qubits got the pair {tuple(qubits)}")


@functools.lru_cache(maxsize=64)
def _permutation(n: int, pairs: Pairs) -> np.ndarray:
    """``p [2^n]`` with ``new[k] = old[p[k]]``."""
    k = np.arange(2**n, dtype=np.uint32)  # unsigned: no index is below zero
    # The last CNOT is the first to be undone; each is its own inverse.
    for control, target in reversed(pairs):
        k = k ^ (((k >> (n - 1 - control)) & 1) << (n - 1 - target))
    return k


def brick(n: int) -> Pairs:
    """``(0,1), (2,3), ...`` then ``(1,2), (3,4), ...``: neighbours, open at the ends.

    >>> brick(5)
    ((0, 1), (2, 3), (1, 2), (3, 4))
    """
    return tuple((i, i + 1) for first in (0, 1) for i in range(first, n - 1, 2))


def ring(n: int, distance: int = 1) -> Pairs:
    """``(i, i + distance mod n)`` for every qubit.

    >>> ring(4, 2)
    ((0, 2), (1, 3), (2, 0), (3, 1))
    """
    if n > 0 and distance % n == 0:
        raise ConfigError(f"a ring of {n} qubits has no pairs at distance {distance}")
    return tuple((i, (i + distance) % n) for i in range(n))
