"""QRNN: a quantum circuit as a recurrent cell; QRNN-RC: the same cell frozen, as a reservoir."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.attention.quantum import statevector as sv
from flora_jax.attention.quantum.cell import Cell, Uniform, affine, linear, positive
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.registry import register


@register(
    "QRNN",
    family="attention",
    paper="Reservoir Computing via Quantum Recurrent Neural Networks",
    arxiv="2211.02612",
    parameters="3 L (D + H) + H O + O",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QRNN(Cell):
    """Quantum recurrent network: ``h_t = tanh(VQC([x_t; h_{t-1}]))``, ``y_t = h_t W_r + b_r``.

    The circuit on ``n = D + H`` qubits, with ``v = [x; h]``: H on all, RY(arctan v_i) and
    RZ(arctan v_i^2) on qubit i; L times a block of the CNOT ring at distance 1, the ring at
    distance 2 and a rotation ``R(a, b, g) = RZ(g) RY(b) RZ(a)`` on every qubit; ``<Z>`` of the
    first H qubits. So ``|h| <= tanh(1) < 1`` after the first token.

    Args:
      hidden: H.
      blocks: L.

    Circuit and sizes are those of a third-party tutorial that follows the paper (its body was not
    seen); the order of the angles in R and their start in ``U(0, 2 pi)`` are inferred. The state
    printed beside the circuit there needs RY(2 arctan v): the gates are followed.

    Example:
        >>> cell = QRNN()
        >>> y, h = cell.apply(cell.init(jax.random.key(0)), jnp.ones((3, 4, 1)))
        >>> cell.count, y.shape, h.shape
        (28, (3, 4, 1), (3, 3))
    """

    hidden: int = 3
    blocks: int = 2

    def __post_init__(self):
        positive(self, "features", "outputs", "hidden", "blocks")
        if self.qubits < 3:
            raise ConfigError(
                f"{type(self).__name__} with features={self.features} and hidden={self.hidden} has "
                f"{self.qubits} qubits; the ring at distance 2 needs 3"
            )

    @property
    def qubits(self) -> int:
        """n = D + H."""
        return self.features + self.hidden

    def leaves(self):
        angles = Uniform((self.blocks, self.qubits, 3), 0.0, 2 * jnp.pi)
        readout = linear(self.hidden, self.outputs)
        return {"angles": angles, **{f"readout/{name}": leaf for name, leaf in readout.items()}}

    def init_state(self, batch, dtype=jnp.float32):
        """``h_0 = 0 [batch, H]``."""
        return jnp.zeros((batch, self.hidden), dtype)

    def circuit(self, v: jax.Array, angles: jax.Array) -> jax.Array:
        """``<Z>`` of the first H qubits ``[H]`` for ``v [n]`` and ``angles [L, n, 3]``."""
        n = self.qubits
        real = jnp.full((2,) * n, 2.0 ** (-n / 2), jnp.result_type(v, angles))  # H on every qubit
        state = sv.layer(sv.layer(real, sv.ry(jnp.arctan(v))), sv.rz(jnp.arctan(v**2)))
        pairs = (*sv.ring(n), *sv.ring(n, 2))
        for block in angles:
            state = sv.layer(sv.cnots(state, pairs), sv.rotation(block))
        return sv.expect_z(state, range(self.hidden))

    def step(self, params, state, x):
        """One token ``x [B, D]``: ``(y [B, O], h [B, H])``."""
        params = self.hold(params)
        h = self._next(params, state, x.astype(state.dtype))
        return affine(params["readout"], h), h

    def states(
        self, params: Mapping[str, Any], x: jax.Array, state: jax.Array | None = None
    ) -> jax.Array:
        """``h_1 ... h_T [B, T, H]`` of a sequence ``x [B, T, D]``.

        Raises:
          StructureError: inputs of another width.
        """
        x, state = self._start(x, state)
        params = self.hold(params)

        def body(h, token):
            h = self._next(params, h, token)
            return h, h

        return jnp.moveaxis(jax.lax.scan(body, state, jnp.moveaxis(x, 1, 0))[1], 0, 1)

    def apply(
        self,
        params: Mapping[str, Any],
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        last: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """A sequence ``x [B, T, D]``: ``(y [B, T, O], h [B, H] after it)``.

        Args:
          params: of :meth:`init`; the read-out's kernel may have an adapter.
          state: h before the sequence; zero if None.
          last: only the last token's output ``[B, 1, O]``.

        Raises:
          StructureError: inputs of another width.
        """
        h = self.states(params, x, state)
        return affine(params["readout"], h[:, -1:] if last else h), h[:, -1]

    def _next(self, params: Mapping[str, Any], h: jax.Array, x: jax.Array) -> jax.Array:
        angles = ops.value(params["angles"], h.dtype)
        v = jnp.concatenate([x, h], axis=-1)
        return jnp.tanh(jax.vmap(self.circuit, (0, None))(v, angles))


@register(
    "QRNNReservoir",
    family="attention",
    paper="Reservoir Computing via Quantum Recurrent Neural Networks",
    arxiv="2211.02612",
    parameters="H O + O",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QRNNReservoir(QRNN):
    """QRNN-RC: the circuit of :class:`QRNN` with random angles that never train.

    Gradients stop at ``angles``; the read-out is trained, or solved at once by :meth:`fit`.

    >>> cell = QRNNReservoir()
    >>> params = cell.init(jax.random.key(0))
    >>> grads = jax.grad(lambda p: cell.apply(p, jnp.ones((1, 2, 1)))[0].sum())(params)
    >>> float(jnp.abs(grads["angles"]).max()), float(grads["readout"]["bias"][0])
    (0.0, 2.0)
    """

    frozen = ("angles",)

    def fit(
        self, params: Mapping[str, Any], x: jax.Array, y: jax.Array, strength: float
    ) -> dict[str, Any]:
        """The parameters with the read-out that ridge regression of ``y`` on ``h_T`` gives.

        Args:
          x: sequences ``[N, T, D]``.
          y: what follows each ``[N, O]``.
          strength: of the penalty; see :func:`ridge`.
        """
        h = self.states(params, x)[:, -1]
        return {**params, "readout": ridge(h, y, strength)}


def ridge(h: jax.Array, y: jax.Array, strength: float) -> dict[str, jax.Array]:
    """``argmin_{W, b} |h W + b - y|^2 + strength |W|^2`` in closed form.

    Args:
      h: ``[N, H]``.
      y: ``[N, O]``.

    Returns:
      ``kernel [H, O]`` and ``bias [O]``; the bias has no penalty.

    Raises:
      StructureError: ``h`` and ``y`` have different numbers of rows.
      ConfigError: a negative strength.
    """
    if h.ndim != 2 or y.ndim != 2 or len(h) != len(y):
        raise StructureError(f"ridge needs h [N, H] and y [N, O], not {h.shape} and {y.shape}")
    if strength < 0:
        raise ConfigError(f"strength={strength} must not be negative")
    mean_h, mean_y = h.mean(0), y.mean(0)
    # As least squares on stacked rows: the normal equations would square the condition number.
    penalty = jnp.sqrt(jnp.asarray(strength, h.dtype)) * jnp.eye(h.shape[1], dtype=h.dtype)
    rows = jnp.concatenate([h - mean_h, penalty])
    wanted = jnp.concatenate([y - mean_y, jnp.zeros((h.shape[1], y.shape[1]), y.dtype)])
    kernel = jnp.linalg.lstsq(rows, wanted)[0]
    return {"kernel": kernel, "bias": mean_y - mean_h @ kernel}
