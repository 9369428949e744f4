"""The state-vector simulator, QFWP and the QRNN reservoir in closed form."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.attention import Variant
from flora_jax.attention.quantum import QFWP, QRNN, QRNNReservoir, StaticVQC, ridge
from flora_jax.attention.quantum import statevector as sv
from flora_jax.core.errors import ConfigError, StructureError
from flora_jax.core.registry import methods

ANGLES = jnp.array([0.3, -1.1, 2.5])
CELLS = {
    "QFWP": QFWP(qubits=3, depth=2, measured=2, features=2, outputs=2),
    "StaticVQC": StaticVQC(qubits=3, depth=2, measured=2, features=2, outputs=2),
    "QRNN": QRNN(features=2, hidden=2, outputs=2),
    "QRNNReservoir": QRNNReservoir(features=2, hidden=2, outputs=2),
}
each = pytest.mark.parametrize("name", CELLS)


def random_state(n, seed=0, dtype=np.complex64):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(2,) * n) + 1j * rng.normal(size=(2,) * n)
    return jnp.asarray(state / np.linalg.norm(state), dtype)


def inputs(cell, batch=2, time=5, seed=0):
    shape = (batch, time, cell.features)
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


@functools.cache
def made(name):
    """A cell with parameters whose biases and angles are no special case."""
    return CELLS[name], CELLS[name].init(jax.random.key(1))


@functools.cache
def compiled(cell, method="apply", **options):
    """A method as one program: operation by operation a circuit compiles for seconds."""
    return jax.jit(functools.partial(getattr(cell, method), **options))


# The simulator ----------------------------------------------------------------------------------


def test_hadamards_give_the_uniform_state():
    state = sv.layer(sv.zero_state(5), jnp.stack([sv.hadamard()] * 5))
    np.testing.assert_allclose(state, np.full((2,) * 5, 2**-2.5), atol=1e-6)
    np.testing.assert_allclose(sv.expect_z(state, range(5)), 0, atol=1e-6)


def test_gates_are_the_exponentials_of_the_pauli_matrices():
    """``exp(-i a P / 2) = cos(a/2) - i sin(a/2) P``, and R turns about Z, Y and Z."""
    pauli = {
        sv.rx: np.array([[0, 1], [1, 0]]),
        sv.ry: np.array([[0, -1j], [1j, 0]]),
        sv.rz: np.diag([1, -1]),
    }
    half = np.asarray(ANGLES)[:, None, None] / 2
    for gate, matrix in pauli.items():
        want = np.cos(half) * np.eye(2) - 1j * np.sin(half) * matrix
        np.testing.assert_allclose(gate(ANGLES), want, atol=1e-6)
    a, b, g = ANGLES
    np.testing.assert_allclose(sv.rotation(ANGLES), sv.rz(g) @ sv.ry(b) @ sv.rz(a), atol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_layer_is_its_gates_one_by_one(n):
    """Also over the edge of a group of four qubits."""
    gates = sv.rotation(jnp.asarray(np.random.default_rng(n).normal(size=(n, 3)), jnp.float32))
    state = random_state(n)
    want = functools.reduce(lambda s, i: sv.apply(s, gates[i], i), range(n), state)
    got = sv.layer(state, gates)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert abs(float(sv.probabilities(got).sum()) - 1) < 1e-6
    assert got.shape == (2,) * n


def test_cnots_are_matrices_in_turn():
    """A CNOT swaps the target where the control is 1; the order of a list matters."""
    n, pairs = 4, ((0, 1), (1, 2), (3, 0), (2, 3))
    zero, one, flip = np.diag([1, 0]), np.diag([0, 1]), np.array([[0, 1], [1, 0]])
    state = np.asarray(random_state(n)).reshape(-1)
    for control, target in pairs:
        off = functools.reduce(np.kron, [zero if i == control else np.eye(2) for i in range(n)])
        parts = {control: one, target: flip}
        on = functools.reduce(np.kron, [parts.get(i, np.eye(2)) for i in range(n)])
        state = (off + on) @ state
    np.testing.assert_allclose(sv.cnots(random_state(n), pairs).reshape(-1), state, atol=1e-6)


def test_cz_is_a_cnot_between_hadamards():
    state = random_state(3)
    h = sv.hadamard()
    want = sv.apply(sv.cnots(sv.apply(state, h, 0), ((2, 0),)), h, 0)
    np.testing.assert_allclose(sv.cz(state, 2, 0), want, atol=1e-6)
    assert sv.cz(state, 2, 0).dtype == jnp.complex64


def test_bell_state():
    bell = sv.cnots(sv.apply(sv.zero_state(2), sv.hadamard(), 0), ((0, 1),))
    np.testing.assert_allclose(bell, np.eye(2) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(sv.expect_z(bell, (0, 1)), 0, atol=1e-6)
    swapped = sv.expect_z(sv.cnots(sv.apply(sv.zero_state(2), sv.rx(0.7), 1), ((1, 0),)), (0, 1))
    np.testing.assert_allclose(swapped, np.cos(0.7), atol=1e-6)


def test_precision_follows_the_dtypes():
    assert sv.layer(sv.zero_state(2), sv.ry(ANGLES[:2])).dtype == jnp.complex64
    assert sv.layer(sv.zero_state(2, jnp.float32), sv.ry(ANGLES[:2])).dtype == jnp.float32
    with jax.enable_x64(True):
        state = sv.zero_state(2, jnp.complex128)
        wide = sv.layer(state, sv.rotation(jnp.full((2, 3), 0.1, jnp.float64)))
        assert wide.dtype == jnp.complex128
        assert abs(float(sv.probabilities(wide).sum()) - 1) < 1e-14
        cell = QFWP(qubits=3, measured=2)
        params = cell.init(jax.random.key(0), jnp.float64)
        y, theta = compiled(cell)(params, jnp.ones((1, 2, 1)))
        assert y.dtype == theta.dtype == jnp.float64


def test_what_the_simulator_refuses():
    state = sv.zero_state(3)
    with pytest.raises(ConfigError, match=r"qubit 3 is outside 0\.\.2"):
        sv.apply(state, sv.hadamard(), 3)
    with pytest.raises(ConfigError, match=r"pair \(1, 1\)"):
        sv.cnots(state, ((1, 1),))
    with pytest.raises(ConfigError, match="outside"):
        sv.cz(state, -1, 0)
    with pytest.raises(ConfigError, match="3 qubits needs 3 gates, got 2"):
        sv.layer(state, sv.ry(ANGLES[:2]))
    with pytest.raises(ConfigError, match="2 qubits has no pairs at distance 2"):
        sv.ring(2, 2)


# Gradients --------------------------------------------------------------------------------------


def test_parameter_shift_is_autodiff():
    """``(f(t + pi/2) - f(t - pi/2)) / 2`` for each angle of both circuits."""
    qfwp, qrnn = QFWP(qubits=4, depth=2, measured=2), QRNN(hidden=2)
    rng = np.random.default_rng(0)
    x, v = jnp.array([0.4]), jnp.array([0.4, -0.2, 0.7])
    circuits = [
        (functools.partial(qfwp.circuit, x), (2, 4)),
        (functools.partial(qrnn.circuit, v), (2, 3, 3)),
    ]
    for circuit, shape in circuits:
        angles = jnp.asarray(rng.normal(size=shape), jnp.float32)
        weights = jnp.array([1.0, -2.0])
        f = jax.jit(lambda a, circuit=circuit, w=weights: circuit(a) @ w)
        steps = np.pi / 2 * np.eye(angles.size).reshape(-1, *shape)
        shifted = jax.vmap(f)(jnp.concatenate([angles + steps, angles - steps]))
        rule = (shifted[: angles.size] - shifted[angles.size :]) / 2
        np.testing.assert_allclose(jax.grad(f)(angles).reshape(-1), rule, atol=1e-5)


# The cells --------------------------------------------------------------------------------------


@each
def test_token_by_token_is_the_whole_sequence(name):
    """The recurrent form, its pieces and the last output alone; one program for every token."""
    cell, params = made(name)
    x = inputs(cell)
    y, final = compiled(cell)(params, x)
    step, state, out = compiled(cell, "step"), cell.init_state(2), []
    for t in range(x.shape[1]):
        one, state = step(params, state, x[:, t])
        out.append(one)
    np.testing.assert_allclose(jnp.stack(out, 1), y, atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)
    assert step._cache_size() == 1
    first, middle = compiled(cell)(params, x[:, :2])
    rest, again = compiled(cell)(params, x[:, 2:], middle)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), y, atol=1e-5)
    np.testing.assert_allclose(again, final, atol=1e-5)
    np.testing.assert_allclose(compiled(cell, last=True)(params, x)[0], y[:, -1:], atol=1e-5)


@each
def test_no_output_sees_a_later_token(name):
    cell, params = made(name)
    x = inputs(cell, batch=1, time=3)
    reach = jax.jit(jax.jacobian(lambda x: cell.apply(params, x)[0][0].sum(-1)))(x)[:, 0]
    seen = jnp.abs(reach).max(-1)
    assert jnp.all(jnp.triu(seen, 1) == 0) and jnp.all(jnp.diag(seen) > 0)
    memory = float(jnp.tril(seen, -1).max())
    assert memory == 0 if name == "StaticVQC" else memory > 1e-3


@each
def test_counts_and_starts(name):
    cell, params = made(name)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == cell.count
    D, O, n = 2, 2, 3
    counts = {"QFWP": (D * n + n) + (n * 2 + 2) + (n * n + n) + (2 * O + O)}
    counts |= {"StaticVQC": 2 * n + 2 * O + O, "QRNN": 3 * 2 * 4 + 2 * O + O}
    assert cell.count == counts.get(name, counts["QRNN"])
    low, high = params["readout"]["kernel"].min(), params["readout"]["kernel"].max()
    assert -(2**-0.5) <= low < high <= 2**-0.5


def test_every_registered_cell_is_tested_here():
    cells = {m.cls for m in methods("attention") if not issubclass(m.cls, Variant)}
    assert cells and cells <= {type(cell) for cell in CELLS.values()}


def test_the_count_of_the_card():
    """16 + 18 + 72 + 5 with a scalar input."""
    parts = jax.tree.map(lambda leaf: leaf.size, QFWP().init(jax.random.key(0)))
    groups = ("encoder", "depth", "qubit", "readout")
    assert [sum(parts[group].values()) for group in groups] == [16, 18, 72, 5]
    assert QFWP().count == 111 and QRNN().count == 28


def test_without_a_programme_it_is_a_static_circuit():
    """Zero slow weights: theta stays 0 and the outputs are those of a circuit with angles 0."""
    cell, params = made("QFWP")
    still, _ = made("StaticVQC")
    x = inputs(cell)
    zero = {**params, "depth": jax.tree.map(jnp.zeros_like, params["depth"])}
    y, theta = compiled(cell)(zero, x)
    assert jnp.all(theta == 0)
    fixed = {"theta": jnp.zeros((2, 3)), "readout": params["readout"]}
    np.testing.assert_array_equal(y, compiled(still)(fixed, x)[0])
    assert not np.allclose(y, compiled(cell)(params, x)[0], atol=1e-2)


def test_theta_is_a_sum_of_rank_one_steps():
    cell, params = made("QFWP")
    x = inputs(cell)
    z = x @ params["encoder"]["kernel"] + params["encoder"]["bias"]
    a = z @ params["depth"]["kernel"] + params["depth"]["bias"]
    b = z @ params["qubit"]["kernel"] + params["qubit"]["bias"]
    _, theta = compiled(cell)(params, x)
    np.testing.assert_allclose(theta, jnp.einsum("btd,btn->bdn", a, b), atol=1e-5)


def test_one_layer_of_qfwp_by_hand():
    """RY(x) turns qubit 0 from |+>, so ``<Z_0> = -sin x``; CNOTs leave the other |+> alone.

    So the angles of the layer after them turn each of these by itself.
    """
    cell = QFWP(qubits=4, depth=1, measured=4)
    circuit = jax.jit(cell.circuit)
    z = circuit(jnp.array([0.3]), jnp.zeros((1, 4)))
    np.testing.assert_allclose(z, [-np.sin(0.3), 0, 0, 0], atol=1e-6)
    turned = circuit(jnp.array([0.3]), jnp.array([[0.0, 0.5, 0, 0]]))
    np.testing.assert_allclose(turned[1], -np.sin(0.5), atol=1e-6)


def test_reservoir_trains_its_read_out_alone():
    cell, params = made("QRNNReservoir")
    x = inputs(cell)
    loss = lambda p: jnp.sum(cell.apply(p, x)[0] ** 2)
    grads = jax.jit(jax.grad(loss))(params)
    assert jnp.all(grads["angles"] == 0) and jnp.all(grads["readout"]["bias"] != 0)
    full = jax.jit(jax.grad(lambda p: jnp.sum(CELLS["QRNN"].apply(p, x)[0] ** 2)))
    assert jnp.abs(full(params)["angles"]).max() > 1e-3
    fitted = compiled(cell, "fit", strength=1e-3)(params, x, x[:, -1])
    np.testing.assert_array_equal(fitted["angles"], params["angles"])


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_ridge_is_the_minimum(strength):
    """The gradient of ``|h W + b - y|^2 + s |W|^2`` is zero, and the normal equations agree."""
    rng = np.random.default_rng(0)
    h, y = (jnp.asarray(rng.normal(size=(40, k)) + 1, jnp.float32) for k in (3, 2))
    found = ridge(h, y, strength)
    cost = lambda p: (
        jnp.sum((h @ p["kernel"] + p["bias"] - y) ** 2) + strength * jnp.sum(p["kernel"] ** 2)
    )
    for grad in jax.tree.leaves(jax.grad(cost)(found)):
        np.testing.assert_allclose(grad, 0, atol=1e-3)
    hc, yc = np.asarray(h - h.mean(0), float), np.asarray(y - y.mean(0), float)
    want = np.linalg.solve(hc.T @ hc + strength * np.eye(3), hc.T @ yc)
    np.testing.assert_allclose(found["kernel"], want, atol=1e-5)


def test_ridge_recovers_what_the_states_hold():
    """Targets that are linear in the last state come back exactly."""
    cell = QRNNReservoir()
    params = cell.init(jax.random.key(0))
    x = inputs(cell, batch=64)
    kernel, bias = jnp.array([[1.0], [-2.0], [0.5]]), jnp.array([0.3])
    y = compiled(cell, "states")(params, x)[:, -1] @ kernel + bias
    found = compiled(cell, "fit", strength=0.0)(params, x, y)["readout"]
    np.testing.assert_allclose(found["kernel"], kernel, atol=2e-3)
    np.testing.assert_allclose(found["bias"], bias, atol=1e-3)


def test_states_are_bounded_and_forget():
    """``|h| <= tanh 1``; two initial states under one input come together."""
    cell = QRNNReservoir()
    params = cell.init(jax.random.key(0))
    x = jnp.broadcast_to(3 * inputs(cell, batch=1, time=200), (2, 200, 1))
    start = jnp.array([[0.9, -0.9, 0.9], [-0.9, 0.9, -0.9]])
    h = compiled(cell, "states")(params, x, start)
    assert jnp.abs(h).max() <= np.tanh(1) + 1e-6
    apart = jnp.linalg.norm(h[0] - h[1], axis=-1)
    assert apart[0] > 1e-2 and apart[-1] < 1e-5 and apart[40] < apart[0] / 10


def test_what_the_cells_refuse():
    with pytest.raises(ConfigError, match="QFWP.features=9 is more than the 8 qubits"):
        QFWP(features=9)
    with pytest.raises(ConfigError, match="StaticVQC.depth=0"):
        StaticVQC(depth=0)
    with pytest.raises(ConfigError, match="hidden=1 has 2 qubits"):
        QRNN(hidden=1)
    cell, params = made("QFWP")
    with pytest.raises(StructureError, match=r"\(2, 3, 1\) is not \[batch, time, features=2\]"):
        cell.apply(params, jnp.ones((2, 3, 1)))
    with pytest.raises(StructureError, match="ridge needs"):
        ridge(jnp.ones((3, 2)), jnp.ones((4, 1)), 0.1)
    with pytest.raises(ConfigError, match="strength=-1"):
        ridge(jnp.ones((3, 2)), jnp.ones((3, 1)), -1)


def test_half_precision_inputs_are_computed_in_float32():
    cell, params = made("QFWP")
    x = inputs(cell).astype(jnp.bfloat16)
    y, state = compiled(cell)(params, x)
    np.testing.assert_allclose(y, compiled(cell)(params, x.astype(jnp.float32))[0], atol=1e-6)
    assert state.dtype == jnp.float32
    assert replace(cell, depth=1).init_state(3, jnp.bfloat16).dtype == jnp.bfloat16
