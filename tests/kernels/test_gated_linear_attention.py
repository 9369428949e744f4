"""Gated linear attention against its recurrence: outputs, states, gradients, every gate."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_close, call, check, features

from flora_jax.core.errors import ConfigError
from flora_jax.kernels.gated_linear_attention import gated_linear_attention, tiles
from flora_jax.kernels.gated_linear_attention.arg_specs import SMALL, ArgSpec


@pytest.mark.parametrize("name", SMALL)
def test_chunks_equal_the_recurrence_with_all_gradients(name):
    spec = SMALL[name]
    limits = (FLOAT32, FLOAT32)
    if spec.dtype == "bfloat16":
        limits = BFLOAT16, BFLOAT16_GRADIENT
    check(spec.draw(jax.random.key(1)), *limits, chunk=16)


@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 200])
def test_any_length_and_sharpness(length):
    """Lengths around the chunk; log-gates ``logsigmoid(N(0, 1)) / normaliser``, one a row."""
    spec = ArgSpec(batch=4, length=length, heads=1, kv_heads=1, dim=8, value_dim=8, state=True)
    args = spec.draw(jax.random.key(length), sharpness=16)
    args["log_decay"] /= jnp.asarray([0.1, 1, 10, 16]).reshape(4, 1, 1, 1)
    both = jax.jit(lambda a: (call(a), call(a, implementation="reference")))(args)
    assert_close(*both, FLOAT32)


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_the_chunk_changes_nothing_but_rounding(gate):
    """What was asked for, shorter and longer than the model's choice, and that choice."""
    spec = ArgSpec(length=200, heads=2, kv_heads=1, dim=8, value_dim=8, gate=gate, state=True)
    args = spec.draw(jax.random.key(5), sharpness=4)
    chunks = (4, 256, None)
    found = jax.jit(lambda a: [call(a, chunk=chunk) for chunk in chunks])(args)
    for other in found[:-1]:
        assert_close(other, found[-1], FLOAT32)


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_extreme_gates_stay_finite_and_exact(gate):
    """Decays of exp(-50) between decays of exp(-0.01), where a sum over the chunk would lose the
    small ones and an inverse overflows; and rows where every decay is exp(-50)."""
    spec = ArgSpec(batch=2, length=40, heads=1, kv_heads=1, dim=8, value_dim=8, gate=gate)
    args = spec.draw(jax.random.key(0))
    hard = jax.random.bernoulli(jax.random.key(1), 0.3, args["log_decay"].shape)
    args["log_decay"] = jnp.where(hard.at[1].set(True), -50.0, -0.01)
    check(args, chunk=32)


def test_features_are_those_computed_apart():
    """Where no kernel makes them: the same function before the op, its gradients too."""
    args = SMALL["grouped"].draw(jax.random.key(4))
    q, k, v, state = (args[name] for name in ("q", "k", "v", "initial_state"))

    def apart(q, k, v):
        q, k, decay = features(q, k)
        return gated_linear_attention(q, k, v, decay, initial_state=state)

    inside = lambda *a: gated_linear_attention(*a, features=features, initial_state=state)
    loss = lambda f: lambda *a: sum(jnp.sum(jnp.sin(x)) for x in f(*a))
    grads = [jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (inside, apart)]
    assert_close(*grads, FLOAT32)
    with pytest.raises(ConfigError, match="features make the log_decay"):
        gated_linear_attention(q, k, v, k, features=features)


def test_no_gate_is_unnormalised_linear_attention():
    """``o_i = scale sum_(j <= i) (q_i k_j) v_j``, also with a gate that is 0 everywhere."""
    args = ArgSpec(length=20, heads=2, kv_heads=2, dim=8, value_dim=8, gate="none").draw(
        jax.random.key(0)
    )
    scores = jnp.einsum("bind,bjnd->bnij", args["q"], args["k"]) * jnp.tril(jnp.ones((20, 20)))
    wanted = jnp.einsum("bnij,bjnd->bind", scores, args["v"]) * 8**-0.5
    for decay in (None, jnp.zeros((1, 20, 2)), jnp.zeros((1, 20, 2, 8))):
        out, _ = call(args | {"log_decay": decay}, chunk=8)
        np.testing.assert_allclose(out, wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["gla", "per head", "linear"])
def test_the_state_hands_over(name):
    """Two calls that pass the state equal one call; also token by token."""
    args = SMALL[name].draw(jax.random.key(2))
    length, cut = args["q"].shape[1], 21
    run = jax.jit(partial(call, chunk=16))
    whole, last = run(args)
    state = args["initial_state"]
    parts = []
    for piece in (slice(0, cut), slice(cut, length - 2), slice(-2, -1), slice(-1, None)):
        part = {n: x[:, piece] for n, x in args.items() if n != "initial_state" and x is not None}
        out, state = run({"log_decay": None} | part | {"initial_state": state})
        parts.append(out)
    assert_close((jnp.concatenate(parts, 1), state), (whole, last), FLOAT32)


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_segments_start_anew(gate):
    """Changes inside chunks and at their edge, a number that comes back, one token alone."""
    spec = ArgSpec(length=40, heads=2, kv_heads=1, dim=8, value_dim=8, gate=gate, state=True)
    args = spec.draw(jax.random.key(3))
    numbers = np.repeat([4, 1, 4, 0, 7, 1], (5, 3, 8, 1, 16, 7))
    check(args | {"segment_ids": jnp.asarray(numbers)[None]}, chunk=8)


def test_the_recurrence_of_packed_sequences_is_that_of_each():
    """The first one continues the initial state, the others start from zero."""
    args = ArgSpec(length=18, heads=1, kv_heads=1, dim=4, value_dim=4, state=True).draw(
        jax.random.key(3)
    )
    run = jax.jit(partial(call, implementation="reference"))
    packed, _ = run(args | {"segment_ids": jnp.repeat(jnp.asarray([2, 0, 2]), 6)[None]})
    for i in range(3):
        part = {n: x[:, 6 * i : 6 * i + 6] for n, x in args.items() if n != "initial_state"}
        state = args["initial_state"] * (i == 0)
        alone, _ = run(part | {"initial_state": state})
        np.testing.assert_allclose(packed[:, 6 * i : 6 * i + 6], alone, atol=1e-6)


def test_gradients_of_the_future_are_zero():
    spec = SMALL["gla"]
    args = spec.draw(jax.random.key(4))
    grads = jax.jit(jax.grad(lambda a: jnp.sum(call(a, chunk=16)[0][:, :33] ** 2)))(args)
    for name in ("q", "k", "v", "log_decay"):
        assert not grads[name][:, 33:].any() and grads[name][:, :33].any(), name


def test_vmap_equals_a_loop():
    spec = dataclasses.replace(SMALL["grouped"], length=12)
    draws = [spec.draw(jax.random.key(i)) for i in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *draws)
    grad = jax.grad(lambda a: sum(jnp.sum(x**2) for x in call(a, chunk=8)))
    ours, grad = jax.jit(jax.vmap(grad))(stacked), jax.jit(grad)
    loop = jax.tree.map(lambda *x: jnp.stack(x), *[grad(a) for a in draws])
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-5), ours, loop)


SHARDED = """
import dataclasses, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from flora_jax.kernels.gated_linear_attention import gated_linear_attention as run
from flora_jax.kernels.gated_linear_attention.arg_specs import SMALL
from recurrence import FLOAT32, assert_close

mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
spec = dataclasses.replace(SMALL["grouped"], batch=2, length=12)
args = list(spec.draw(jax.random.key(0)).values())[:4]
spread = jax.shard_map(lambda *a: run(*a, chunk=8), mesh=mesh,
                       in_specs=(P("b", None, "h"),) * 4,
                       out_specs=(P("b", None, "h"), P("b", "h")))
loss = lambda f: lambda a: sum(jnp.sum(x**2) for x in f(*a))
grads = [jax.jit(jax.grad(loss(f)))(args) for f in (spread, run)]
assert_close(*grads, FLOAT32)
"""


def test_shard_map_over_batch_and_heads():
    """On four simulated devices, which need a process of their own."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.path.dirname(__file__),
    }
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=env)


def test_memory_grows_with_the_length_not_its_square():
    """Temporary bytes of forward and gradient per token, at two lengths."""

    def per_token(length):
        spec = ArgSpec(length=length, heads=2, kv_heads=1, dim=16, value_dim=16)
        args = [x for x in spec.shapes().values() if x is not None]
        f = jax.grad(lambda *a: jnp.sum(gated_linear_attention(*a)[0]), argnums=(0, 1, 2, 3))
        compiled = jax.jit(f).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / length

    assert per_token(4096) < 1.1 * per_token(1024)


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ConfigError, match="3 query heads are no multiple of 2 key heads"):
        gated_linear_attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ConfigError, match=r"log_decay must be \(1, 4, 3, 8\) or \(1, 4, 3\)"):
        gated_linear_attention(x, x, x, x[..., :2])
    with pytest.raises(ConfigError, match="chunk must be a power of two, not 24"):
        gated_linear_attention(x, x, x, chunk=24)
    with pytest.raises(ConfigError, match="at least one token"):
        gated_linear_attention(x[:, :0], x[:, :0], x[:, :0])
    with pytest.raises(ConfigError, match=r"q must be \[B, T, heads, channels\]"):
        gated_linear_attention(x[0], x, x)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_every_pair_belongs_to_one_level(chunk):
    """Levels and diagonal make the lower triangle; the two sums of a pair make its decay."""
    i, j = np.indices((chunk, chunk))
    pairs = np.zeros((chunk, chunk))
    for summed, members in tiles.levels(chunk):
        pairs += members
        for a, b in np.argwhere(np.asarray(members) > 0):
            crossed = (j[0] > b) & (j[0] <= a)
            np.testing.assert_array_equal(np.asarray(summed)[a] + np.asarray(summed)[b], crossed)
    np.testing.assert_array_equal(pairs, j < i)
