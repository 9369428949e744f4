"""Block-sparse attention against its specification, the softmax over a dense mask."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_sparse import agree, problem, results, run

from flora_jax.core.errors import ConfigError
from flora_jax.kernels.block_sparse_attention import Steps, xla
from flora_jax.kernels.block_sparse_attention.layout import segments

CASES = {
    "whole blocks": {},
    "tails of both kinds": {"queries": 37, "keys": 29},
    "one short block": {"queries": 5, "keys": 3, "entries": 1},
    "two heads per key head": {"heads": 4, "queries": 20, "keys": 27, "batch": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    agree(problem(**CASES[case]))


def test_bfloat16():
    arguments = problem(queries=37, keys=29, heads=4, dtype="bfloat16")
    agree(arguments, outputs=5e-3, grads=8e-3)


def test_steps_of_the_map_change_nothing():
    """All query blocks in a step, which is the choice at this size, and one at a time."""
    arguments = problem(queries=64, entries=2)
    found = []
    for steps, length in ((None, 1), (Steps(queries=1), 4), (Steps(queries=3), 2)):
        assert f"length={length}" in str(jax.make_jaxpr(partial(run, steps=steps))(*arguments))
        found.append(results(arguments, "xla", steps=steps))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for other in found[1:]:
        jax.tree.map(close, other, found[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_all_blocks_are_softmax(implementation):
    q, k, v, table = problem(keys=29, entries=4)
    o, lse = run(q, k, v, table, implementation, scale=0.3)
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.3)
    np.testing.assert_allclose(o, expected, atol=2e-6)
    s = 0.3 * np.einsum("btnh,bsnh->btns", q, k)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(s, axis=-1), atol=2e-6)


def test_the_order_of_a_row_means_nothing():
    q, k, v, table = problem()
    o, lse = run(q, k, v, table)
    flipped = run(q, k, v, table[..., ::-1])
    np.testing.assert_allclose(o, flipped[0], atol=1e-6)
    np.testing.assert_allclose(lse, flipped[1], atol=1e-6)


def test_a_block_that_all_rows_list_and_blocks_that_none_lists():
    q, k, v, table = problem(queries=64, entries=1)
    table = jnp.full_like(table, 2)
    agree((q, k, v, table))
    _, (_, dk, dv) = results((q, k, v, table), "xla")
    for x in (dk, dv):
        assert not np.any(np.delete(np.asarray(x), np.s_[16:24], axis=1))
        assert np.all(np.any(np.asarray(x)[:, 16:24], axis=(-2, -1)))


def test_a_block_listed_twice_counts_twice():
    q, k, v, table = problem()
    agree((q, k, v, table.at[..., 1].set(table[..., 0])))


def test_equal_keys_give_the_mean_of_the_values():
    q, k, v, table = problem(entries=4)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    o, _ = run(q, k, v, table)
    np.testing.assert_allclose(o, np.broadcast_to(v.mean(1, keepdims=True), o.shape), atol=1e-6)
    agree((q, k, v, table))


def test_large_scores_stay_finite():
    q, k, v, table = problem()
    agree((20 * q, 20 * k, v, table), outputs=1e-5, grads=1e-3)


def test_vmap_is_a_loop():
    many = [jnp.stack(x) for x in zip(*(problem(seed=s) for s in range(2)))]
    got = jax.vmap(run)(*many)
    expected = [run(*(x[i] for x in many)) for i in range(2)]
    for x, y in zip(got, zip(*expected)):
        np.testing.assert_allclose(x, jnp.stack(y), atol=1e-6)


def test_the_table_has_no_gradient():
    q, k, v, table = problem()
    o, pull = jax.vjp(run, q, k, v, table)
    assert pull(jax.tree.map(jnp.ones_like, o))[3].dtype == jax.dtypes.float0


def temporaries(tokens):
    shapes = [jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)] * 3
    table = jax.ShapeDtypeStruct((1, 1, tokens // 16, 4), jnp.int32)
    loss = lambda q, k, v, table: run(q, k, v, table)[0].sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, table).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_not_its_square(monkeypatch):
    monkeypatch.setattr(xla, "TILE", 1 << 12)
    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.5 * small
    assert large < 4096 * 4096


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("kind", ["random", "hot"])
def test_segments_hold_every_pair_once_under_its_key_block(length, kind):
    total, blocks = 23, 6
    table = np.random.default_rng(0).integers(blocks, size=total)
    table = np.where(table == 3, 2, table) if kind == "random" else np.full(total, 4)
    column, pairs, count = map(np.asarray, segments(jnp.asarray(table, jnp.int32), blocks, length))
    assert column.shape == (-(-total // length) + blocks,)
    assert (np.diff(column) >= 0).all() and set(column) == set(range(blocks))
    assert count.max() <= length
    found = [(c, p) for c, row, n in zip(column, pairs, count) for p in row[:n]]
    assert sorted(p for _, p in found) == list(range(total))
    assert all(table[p] == c for c, p in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": jnp.zeros((1, 2, 3, 1), jnp.int32)}, r"\(1, 2, 3, 1\): \(1, 2, 2, 'K'\)"),
        ({"table": jnp.zeros((1, 2, 2, 1), jnp.float32)}, "float32; int32 expected"),
        ({"k": jnp.zeros((1, 32, 3, 8))}, "q .* k .*"),
        ({"v": jnp.zeros((1, 32, 2, 8), jnp.bfloat16)}, "one floating dtype"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_named(change, message):
    arguments = dict(zip("qkv", problem()[:3])) | {"table": problem()[3]} | change
    if "k" in change:
        arguments["v"] = change["k"]
    with pytest.raises(ConfigError, match=message):
        run(**arguments)


SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from block_sparse import problem, run
arguments = problem(heads=2, key_heads=1)
q, table = P(None, None, "heads"), P(None, "heads")
def grads(q, k, v, table):
    return jax.grad(lambda *x: run(*x, table)[0].sum(), (0, 1, 2))(q, k, v)
mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
specs = {"in_specs": (q, P(), P(), table), "out_specs": (q, P(), P())}
sharded = jax.jit(jax.shard_map(grads, mesh=mesh, **specs))
for x, y in zip(sharded(*arguments), grads(*arguments)):
    np.testing.assert_allclose(x, y, atol=1e-6)
print("devices", jax.device_count())
"""


def test_under_shard_map():
    """Heads on two devices; the key head is shared, so its gradient is a sum over them."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    how = {
        "cwd": Path(__file__).parent,
        "env": os.environ | flags,
        "capture_output": True,
        "text": True,
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], **how)
    assert done.stdout == "devices 2\n", done.stderr
