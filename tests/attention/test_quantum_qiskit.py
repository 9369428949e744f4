"""The circuits against Qiskit's exact state vectors: values and gradients.

Qiskit numbers qubits from the least significant bit; ours start at the most significant one, so
amplitudes are compared with the axes reversed. Its gradients come from the parameter-shift rule on
its own circuits, ours from autodiff.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.attention.quantum import QFWP, QRNN
from flora_jax.attention.quantum import statevector as sv

pytestmark = pytest.mark.interop
qiskit = pytest.importorskip("qiskit", reason="the extra `interop` brings qiskit")
info = pytest.importorskip("qiskit.quantum_info")


@pytest.fixture(scope="module", autouse=True)
def _wide():
    """Qiskit computes in complex128."""
    with jax.enable_x64(True):
        yield


def z_values(circuit, count):
    p = np.abs(info.Statevector(circuit).data.reshape((2,) * circuit.num_qubits).T) ** 2
    axes = range(p.ndim)
    return np.array([np.subtract(*p.sum(tuple(a for a in axes if a != i))) for i in range(count)])


def shift_gradient(f, angles):
    """``d f / d angle`` for each angle, from two evaluations each."""
    out = np.zeros(angles.shape)
    for index in np.ndindex(angles.shape):
        step = np.zeros(angles.shape)
        step[index] = np.pi / 2
        out[index] = (f(angles + step) - f(angles - step)) / 2
    return out


def qfwp_circuit(cell, x, theta):
    """By the published description, with Qiskit's own gates."""
    circuit = qiskit.QuantumCircuit(cell.qubits)
    circuit.h(range(cell.qubits))
    for i, value in enumerate(x):
        circuit.ry(value, i)
    for angles in theta:
        for first in (0, 1):
            for i in range(first, cell.qubits - 1, 2):
                circuit.cx(i, i + 1)
        for i, angle in enumerate(angles):
            circuit.ry(angle, i)
    return circuit


def qrnn_circuit(cell, v, angles):
    n = cell.qubits
    circuit = qiskit.QuantumCircuit(n)
    circuit.h(range(n))
    for i, value in enumerate(v):
        circuit.ry(np.arctan(value), i)
        circuit.rz(np.arctan(value**2), i)
    for block in angles:
        for distance in (1, 2):
            for i in range(n):
                circuit.cx(i, (i + distance) % n)
        for i, (a, b, g) in enumerate(block):
            circuit.rz(a, i)
            circuit.ry(b, i)
            circuit.rz(g, i)
    return circuit


def test_amplitudes_of_a_random_circuit():
    """Every gate of the simulator, phases included."""
    rng = np.random.default_rng(0)
    n, circuit, state = 5, qiskit.QuantumCircuit(5), sv.zero_state(5, jnp.complex128)
    for kind in rng.permutation(["h", "rx", "ry", "rz", "cx", "cz", "r"] * 6):
        i, j = map(int, rng.choice(n, 2, replace=False))
        a, b, g = rng.normal(size=3)
        if kind == "h":
            circuit.h(i)
            state = sv.apply(state, sv.hadamard(jnp.float64), i)
        elif kind == "cx":
            circuit.cx(i, j)
            state = sv.cnots(state, ((i, j),))
        elif kind == "cz":
            circuit.cz(i, j)
            state = sv.cz(state, i, j)
        elif kind == "r":
            circuit.rz(a, i)
            circuit.ry(b, i)
            circuit.rz(g, i)
            state = sv.apply(state, sv.rotation(jnp.array([a, b, g])), i)
        else:
            getattr(circuit, kind)(a, i)
            state = sv.apply(state, getattr(sv, kind)(a), i)
    theirs = info.Statevector(circuit).data.reshape((2,) * n).T
    np.testing.assert_allclose(state, theirs, atol=1e-12)
    np.testing.assert_allclose(sv.expect_z(state, range(n)), z_values(circuit, n), atol=1e-12)


@pytest.mark.parametrize(
    "cell, circuit, shape",
    [(QFWP(), qfwp_circuit, (2, 8)), (QRNN(), qrnn_circuit, (2, 4, 3))],
    ids=["QFWP", "QRNN"],
)
def test_circuits_and_their_gradients(cell, circuit, shape):
    """The sizes of the cards: 8 qubits, 4 read out; 4 qubits, 3 read out."""
    rng = np.random.default_rng(1)
    inputs = rng.uniform(-1, 1, 1 if isinstance(cell, QFWP) else 4)
    angles = rng.normal(size=shape)
    count = 4 if isinstance(cell, QFWP) else 3
    weights = np.array([1.0, -0.5, 2.0, 0.3])[:count]
    ours = lambda a: cell.circuit(jnp.asarray(inputs), a) @ weights
    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(angles))
    theirs = lambda a: z_values(circuit(cell, inputs, a), count) @ weights
    np.testing.assert_allclose(value, theirs(angles), atol=1e-12)
    np.testing.assert_allclose(gradient, shift_gradient(theirs, angles), atol=1e-10)


def test_qfwp_on_a_window():
    """The whole recurrence: the slow programmer in NumPy, each token's circuit in Qiskit."""
    cell = QFWP()
    params = cell.init(jax.random.key(3), jnp.float64)
    x = np.random.default_rng(2).uniform(-1, 1, (1, 4, 1))
    y, final = jax.jit(cell.apply)(params, x)
    theta, out = np.zeros((2, 8)), []
    for token in x[0]:
        z = affine(params["encoder"], token)
        theta = theta + np.outer(affine(params["depth"], z), affine(params["qubit"], z))
        out.append(affine(params["readout"], z_values(qfwp_circuit(cell, token, theta), 4)))
    np.testing.assert_allclose(y[0], out, atol=1e-12)
    np.testing.assert_allclose(final[0], theta, atol=1e-12)


def test_qrnn_on_a_window():
    cell = QRNN()
    params = cell.init(jax.random.key(3), jnp.float64)
    x = np.random.default_rng(2).uniform(-1, 1, (1, 4, 1))
    y, final = jax.jit(functools.partial(cell.apply, last=True))(params, x)
    h = np.zeros(3)
    for token in x[0]:
        circuit = qrnn_circuit(cell, np.concatenate([token, h]), np.asarray(params["angles"]))
        h = np.tanh(z_values(circuit, 3))
    np.testing.assert_allclose(final[0], h, atol=1e-12)
    np.testing.assert_allclose(y[0, 0], affine(params["readout"], h), atol=1e-12)


def affine(layer, x):
    return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
