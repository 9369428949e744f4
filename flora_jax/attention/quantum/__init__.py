"""Small exact quantum sequence models on a state-vector simulator in plain jax.numpy.

    statevector   gates, one layer of gates, CNOT, CZ and <Z> on amplitudes ``[2] * n``
    QFWP          a circuit whose angles a linear slow programmer writes, token by token
    StaticVQC     the same circuit with angles of its own: what QFWP is compared with
    QRNN          a circuit as a recurrent cell, all of it trained
    QRNNReservoir the same cell frozen; the read-out alone is trained, or solved by ridge

A *cell* is a frozen dataclass with ``leaves()``, ``init(key)``, ``init_state(batch)``,
``step(params, state, x [B, D]) -> (y [B, O], state)`` and
``apply(params, x [B, T, D], state) -> (y [B, T, O], state)``. They mix a sequence as an attention
does but have no queries, keys and values, so ``step`` and ``apply`` stand in for ``attend``: a
state is a pytree of static shape, and a sequence may be cut anywhere.
"""

from flora_jax.attention.quantum import statevector
from flora_jax.attention.quantum.qfwp import QFWP, StaticVQC
from flora_jax.attention.quantum.qrnn import QRNN, QRNNReservoir, ridge

__all__ = ["QFWP", "QRNN", "QRNNReservoir", "StaticVQC", "ridge", "statevector"]
