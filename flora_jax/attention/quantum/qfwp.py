"""QFWP: a quantum circuit whose angles a linear slow programmer writes, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.attention.quantum import statevector as sv
from flora_jax.attention.quantum.cell import Cell, Uniform, affine, linear, positive
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError
from flora_jax.core.registry import register


@register(
    "QFWP",
    family="attention",
    paper="Learning to Program Variational Quantum Circuits with Fast Weights",
    arxiv="2402.17760",
    parameters="D n + n + n (d + n) + d + n + m O + O",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QFWP(Cell):
    """Quantum fast weight programmer: the circuit's angles are the recurrent state.

        z_t = x_t W_e + b_e   [n]
        theta_t = theta_{t-1} + (z_t W_a + b_a) (z_t W_b + b_b)^T   [d, n],  theta_0 = 0
        y_t = <Z>_{0..m-1} of circuit(x_t, theta_t) W_r + b_r   [O]

    The circuit on n qubits: H on all, RY(x_i) on qubit i for the D features, then d times the open
    brick of CNOTs and RY(theta_l,i) on every qubit. It is real, so the amplitudes are too. The
    slow programmer is linear in the tokens and never sees theta: theta_t is a running sum, so
    :meth:`apply` evaluates all circuits of a sequence at once and is still exact.

    Args:
      qubits: n, also the width of z.
      depth: d.
      measured: m, qubits that are read out.

    With the defaults 111 parameters. Facts are those of the authors' code (ycchen1989/Quantum_FWP),
    which the paper describes; linear layers start as torch's do there.

    Example:
        >>> cell = QFWP()
        >>> y, theta = cell.apply(cell.init(jax.random.key(0)), jnp.ones((3, 4, 1)))
        >>> cell.count, y.shape, theta.shape
        (111, (3, 4, 1), (3, 2, 8))
    """

    qubits: int = 8
    depth: int = 2
    measured: int = 4

    def __post_init__(self):
        positive(self, "features", "outputs", "qubits", "depth", "measured")
        for name in ("features", "measured"):
            if getattr(self, name) > self.qubits:
                name = f"{type(self).__name__}.{name}={getattr(self, name)}"
                raise ConfigError(f"{name} is more than the {self.qubits} qubits")

    def leaves(self):
        slow = {
            "encoder": linear(self.features, self.qubits),
            "depth": linear(self.qubits, self.depth),
            "qubit": linear(self.qubits, self.qubits),
        }
        return flat({**slow, "readout": linear(self.measured, self.outputs)})

    def init_state(self, batch, dtype=jnp.float32):
        """``theta_0 = 0 [batch, d, n]``."""
        return jnp.zeros((batch, self.depth, self.qubits), dtype)

    def delta(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """What the slow programmer adds for tokens ``[..., D]``: ``[..., d, n]`` of rank one."""
        z = affine(params["encoder"], x)
        a, b = affine(params["depth"], z), affine(params["qubit"], z)
        return a[..., :, None] * b[..., None, :]

    def circuit(self, x: jax.Array, theta: jax.Array) -> jax.Array:
        """``<Z>`` of the measured qubits ``[m]`` for one token ``[D]`` and ``theta [d, n]``."""
        n = self.qubits
        state = jnp.full((2,) * n, 2.0 ** (-n / 2), jnp.result_type(x, theta))  # H on every qubit
        gates = sv.ry(x)
        for i in range(self.features):
            state = sv.apply(state, gates[i], i)
        for angles in theta:
            state = sv.layer(sv.cnots(state, sv.brick(n)), sv.ry(angles))
        return sv.expect_z(state, range(self.measured))

    def step(self, params, state, x):
        """One token ``x [B, D]``: ``(y [B, O], theta)``; theta is updated before it is used."""
        y, state = self.apply(params, x[:, None], state)
        return y[:, 0], state

    def apply(
        self,
        params: Mapping[str, Any],
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        last: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """A sequence ``x [B, T, D]``: ``(y [B, T, O], theta [B, d, n] after it)``.

        Args:
          params: of :meth:`init`; kernels may have adapters.
          state: theta before the sequence; zero if None.
          last: only the last token's output ``[B, 1, O]``: one circuit a sequence, not T.

        Raises:
          StructureError: inputs of another width.
        """
        x, state = self._start(x, state)
        theta = state[:, None] + jnp.cumsum(self.delta(params, x), axis=1)  # [B, T, d, n]
        final = theta[:, -1]
        if last:
            x, theta = x[:, -1:], theta[:, -1:]
        z = jax.vmap(jax.vmap(self.circuit))(x, self._angles(params, theta))
        return affine(params["readout"], z), final

    def _angles(self, params: Mapping[str, Any], theta: jax.Array) -> jax.Array:
        """The circuit's angles: theta itself."""
        return theta


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticVQC(QFWP):
    """The circuit of :class:`QFWP` with trained angles ``theta [d, n]``, the same for every token.

    It has no memory: an output follows from its own token alone, and the state is zero. Angles
    start in ``U(-pi, pi)``.

    >>> StaticVQC().count, StaticVQC(features=4).count
    (21, 21)
    """

    def leaves(self):
        theta = Uniform((self.depth, self.qubits), -jnp.pi, jnp.pi)
        return {"theta": theta, **flat({"readout": linear(self.measured, self.outputs)})}

    def delta(self, params, x):
        return jnp.zeros((*x.shape[:-1], self.depth, self.qubits), x.dtype)

    def _angles(self, params, theta):
        return theta + ops.value(params["theta"], theta.dtype)


def flat(layers: Mapping[str, Mapping[str, Uniform]]) -> dict[str, Uniform]:
    """``{layer/name: leaf}``."""
    return {f"{k}/{name}": leaf for k, group in layers.items() for name, leaf in group.items()}
