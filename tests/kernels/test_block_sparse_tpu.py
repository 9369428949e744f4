"""The TPU kernels: in the simulator, with races looked for and memory full of NaN, and compiled."""

import functools
import re

import block_sparse as common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.block_sparse_attention import (
    Steps,
    arg_specs,
    block_sparse_attention,
    pallas_tpu,
)
from flora_jax.kernels.block_sparse_attention.layout import shape_of

BLOCKS = {"block_q": 128, "block_k": 16}
WIDTHS = (8, 128)
"""Heads that are copied into tiles of their own, and heads of whole lanes, which are not."""


@pytest.fixture(autouse=True)
def simulator(capfd):
    """Every kernel of a test runs in the simulator, which prints the races that it finds."""
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with dispatch.interpret(mode):
        yield
    assert "RACE" not in capfd.readouterr().out


def problem(queries, keys, entries, **kwargs):
    """As ``common.problem``, with this file's blocks."""
    q, k, v, _ = common.problem(queries=queries, keys=keys, **kwargs)
    blocks = -(-queries // 128), -(-keys // 16)
    order = np.random.default_rng(1).permuted(
        np.tile(np.arange(blocks[1]), (q.shape[0], q.shape[2], blocks[0], 1)), axis=-1
    )
    return q, k, v, jnp.asarray(order[..., :entries], jnp.int32)


agree = functools.partial(common.agree, implementation="pallas_tpu", **BLOCKS)


@pytest.mark.parametrize("width", WIDTHS)
def test_float32_with_tails_and_steps_of_several_blocks(width):
    """Three entries in steps of two: the last step is padded. Two query heads per key head."""
    steps = Steps(keys=2, queries=2)
    agree(problem(150, 57, 3, heads=4, key_heads=2, width=width), steps=steps)


def test_bfloat16_in_one_step():
    agree(problem(256, 64, 3, dtype="bfloat16"), outputs=5e-3, grads=8e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_hot_block_blocks_that_none_lists_and_a_call_per_head(monkeypatch, width):
    """Room for the prefetched numbers of the keys' gradients of one of the two heads."""
    monkeypatch.setattr(pallas_tpu, "SMEM", 100)
    q, k, v, table = problem(200, 64, 1, width=width)
    agree((q, k, v, jnp.full_like(table, 2)))


def test_a_block_listed_twice_counts_twice():
    q, k, v, table = problem(128, 64, 3, heads=1, key_heads=1)
    agree((q, k, v, table.at[..., 1].set(table[..., 0])))


def test_vmap_is_a_loop():
    many = [jnp.stack(x) for x in zip(*(problem(128, 32, 1, seed=s) for s in range(2)))]
    got, expected = (
        jax.vmap(lambda q, k, v, table, how=how: common.run(q, k, v, table, how, **BLOCKS))(*many)
        for how in ("pallas_tpu", "xla")
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("blocks", "dtype", "message"),
    [
        ((64, 16), "float32", "blocks 64 x 16: multiples of 128 x 8 in float32"),
        ((128, 8), "bfloat16", "blocks 128 x 8: multiples of 128 x 16 in bfloat16"),
        ((128, 8), "float16", "float32 or bfloat16, not float16"),
        (
            (2048, 4096),
            "float32",
            "no step of the output with blocks 2048 x 4096: 1 of 4096 x 2048 need .* MiB of 14",
        ),
    ],
)
def test_what_cannot_run_says_why(blocks, dtype, message):
    q, k, v, table = common.problem(dtype=dtype)
    shape = shape_of(q, k, v, table[:, :, :1], *blocks, None)
    with pytest.raises(NotImplementedError, match=message):
        pallas_tpu.forward(shape, q, k, v, table)


def test_what_is_asked_for_replaces_the_models_choice_and_must_fit():
    """A step of the output's kernel per two entries; keys' gradients a query block at a time."""
    arguments = problem(256, 128, 4)

    def grids(steps):
        loss = lambda *a: common.run(*a, "pallas_tpu", **BLOCKS, steps=steps)[0].sum()
        return re.findall(r"grid=(\(.*?\))", str(jax.make_jaxpr(jax.grad(loss))(*arguments)))

    assert sorted(grids(Steps(keys=2, queries=1))) == ["(2, 16)", "(2, 2, 2)", "(2, 2, 2)"]
    assert grids(None).count("(2, 2, 1)") == 2
    with pytest.raises(NotImplementedError, match="the output .*: 512 of 16 x 128 need .* of 14"):
        grids(Steps(keys=512))
    with pytest.raises(NotImplementedError, match="keys' gradient .*: 512 of 128 x 16 need"):
        grids(Steps(queries=512))


def run(spec, *args):
    blocks = {"block_q": spec.block_q, "block_k": spec.block_k}
    return block_sparse_attention(*args, **blocks, implementation="pallas_tpu")[0]


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("spec", arg_specs.SPECS[-2:], ids=lambda spec: spec.name)
def test_forward_and_backward_compile_for_tpu(spec, aot_target):
    """The video's length in bfloat16, and float32."""
    loss = lambda q, k, v, table: run(spec, q, k, v, table).astype(jnp.float32).sum()
    with dispatch.interpret(False):
        gradient = jax.grad(loss, (0, 1, 2))
        compiled = aot.compile(gradient, *spec.arguments(), target=aot_target)
    assert compiled.kernels.count("tpu_custom_call") == 3
