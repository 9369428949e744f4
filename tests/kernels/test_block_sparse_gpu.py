"""The Hopper kernels: tile arithmetic, jax's GPU interpreter, compiled for H100, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_sparse import agree, problem
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import aot, dispatch, hopper
from flora_jax.kernels.block_sparse_attention import (
    Steps,
    arg_specs,
    block_sparse_attention,
    mosaic_gpu,
    program,
    tile,
)
from flora_jax.kernels.block_sparse_attention.layout import shape_of

Ring = hopper.Ring
SIDES = {"gpu": tile.Rows(axis=1, keep=False), "tpu": tile.Rows(axis=0, keep=True)}


def draw():
    """Scores of 4 queries and 3 tiles of 5 keys, and values; some scores large or masked."""
    rng = np.random.default_rng(0)
    s = (10 * rng.normal(size=(4, 3, 5))).astype(np.float32)
    s[1, 2] = tile.MASKED
    s[2, 0] += 300
    return s, rng.normal(size=(3, 5, 2)).astype(np.float32)


@pytest.mark.parametrize("side", SIDES)
def test_online_softmax_of_tiles_is_softmax(side):
    rows = SIDES[side]
    turn = (lambda x: x.T) if rows.axis == 0 else (lambda x: x)
    s, v = draw()
    shape = (1, 4) if rows.keep else (4,)
    top, total, acc = jnp.full(shape, tile.MASKED), jnp.zeros(shape), jnp.zeros((4, 2))
    for t in range(3):
        p, decay, top, total = tile.softmax_step(turn(s[:, t]), top, total, rows)
        acc = acc * decay.reshape(4, 1) + turn(p) @ v[t]
    natural = s.reshape(4, 15) / tile.LOG2E
    expected = jax.nn.softmax(natural, axis=-1) @ v.reshape(15, 2)
    np.testing.assert_allclose(acc / total.reshape(4, 1), expected, rtol=1e-5, atol=1e-6)
    lse = jax.nn.logsumexp(natural, axis=-1)
    np.testing.assert_allclose(tile.log_sum(top, total).reshape(4), lse, rtol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_score_gradient_is_softmax_s_gradient(side):
    rows = SIDES[side]
    turn = (lambda x: x.T) if rows.axis == 0 else (lambda x: x)
    s, v = draw()
    s, v = s[:, 0], v[0]
    do = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    natural = s / tile.LOG2E
    f = lambda x: (jax.nn.softmax(x, axis=-1) @ v, jax.nn.logsumexp(x, axis=-1))
    (o, lse), pull = jax.vjp(f, natural)
    dlse = jnp.arange(4.0)
    row = (lambda x: x[None]) if rows.keep else (lambda x: x)
    terms = row((o * do).sum(axis=-1) - dlse)
    p = tile.weights(turn(s), row(lse * tile.LOG2E), rows)
    ds = tile.score_gradient(p, turn(do @ v.T), terms, rows)
    np.testing.assert_allclose(turn(p), jax.nn.softmax(natural, axis=-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(turn(ds), pull((do, dlse))[0], atol=1e-3)


def product(x, y, shape, transpose=False):
    del shape
    y = y[...].astype(jnp.float32)
    return x[...].astype(jnp.float32) @ (y.T if transpose else y)


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no public GPU interpreter"
)
@pytest.mark.parametrize(
    ("block_q", "block_k", "width", "batch", "key_heads"),
    [(128, 64, 64, 1, 2), (64, 128, 128, 2, 1)],
    ids=["128x64", "64x128"],
)
@pytest.mark.interpreter
def test_interpreted_kernels_equal_the_reference(
    monkeypatch, block_q, block_k, width, batch, key_heads
):
    """All but the products, as that interpreter has no matrix unit within loops: the ring of
    buffers, copies, barriers, two reading warpgroups, grouped heads, short last blocks, a block
    listed twice and one that none lists, several segments of a block's gradient, with memory that
    starts as NaN and race detection."""
    monkeypatch.setattr(program, "product", product)
    monkeypatch.setattr(
        program, "add_product", lambda total, x, y: total + product(x, y, total.shape)
    )
    # As products load here, every ring needs the fence that the matrix unit's reads do not.
    ring = lambda *args, loaded: Ring(*args, loaded=True)
    monkeypatch.setattr(hopper, "Ring", ring)
    # Fewer buffers than steps, so that they are filled again.
    monkeypatch.setattr(hopper, "slots", lambda *sizes: 2)
    rng = np.random.default_rng(1)
    heads = {"heads": 2 * key_heads, "key_heads": key_heads, "width": width}
    q, k, v, _ = problem(150, 200, **heads, batch=batch, dtype="bfloat16")
    blocks = -(-150 // block_q), -(-200 // block_k)
    table = jnp.asarray(rng.integers(1, blocks[1], (batch, 2 * key_heads, blocks[0], 3)), jnp.int32)
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        how = {"block_q": block_q, "block_k": block_k, "steps": Steps(queries=2)}
        agree((q, k, v, table), "mosaic_gpu", 5e-3, 8e-3, **how)


@pytest.mark.parametrize(("queries", "segments"), [(None, 1), (2, 8)])
def test_the_segments_asked_for(queries, segments):
    """Of 16 pairs; every one of the 4 key blocks may end with a short segment."""
    q = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.int32)
    how = {"block_q": 64, "block_k": 64, "steps": Steps(queries=queries)}
    loss = lambda *x: jnp.sum(block_sparse_attention(*x, **how, implementation="mosaic_gpu")[1])
    with dispatch.target("sm90"):
        jaxpr = jax.make_jaxpr(jax.grad(loss, 1))(q, q, q, table)
    assert f"f32[1,1,{segments + 4},64,64]" in str(jaxpr)


@pytest.mark.parametrize(
    ("dtype", "width", "blocks", "message"),
    [
        ("float32", 64, (64, 64), "bfloat16 or float16, not float32"),
        ("bfloat16", 32, (64, 64), "heads of width 64 or 128, not 32"),
        ("bfloat16", 64, (256, 64), "blocks 256 x 64: 64 or 128 each"),
    ],
)
def test_what_cannot_run_says_why(dtype, width, blocks, message):
    q, k, v, table = problem(dtype=dtype, width=width)
    shape = shape_of(q, k, v, table[:, :, :1], *blocks, None)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.forward(shape, q, k, v, table)


def test_a_forced_kernel_says_what_it_cannot():
    q, k, v, table = problem()
    with dispatch.target("sm90"):
        block_sparse_attention(q, k, v, table, block_q=16, block_k=8)
        with pytest.raises(NotImplementedError, match="mosaic_gpu: bfloat16 or float16"):
            block_sparse_attention(
                q, k, v, table, block_q=16, block_k=8, implementation="mosaic_gpu"
            )


def run(spec, *args):
    blocks = {"block_q": spec.block_q, "block_k": spec.block_k}
    return block_sparse_attention(*args, **blocks, implementation="mosaic_gpu")[0]


WIDE = arg_specs.Spec(name="128 x 128, GQA, tails", length=1000, key_heads=4, block_k=128)
NARROW = arg_specs.Spec(
    name="64 x 64 D64, odd length", length=509, width=64, block_q=64, key_heads=1, density=0.5
)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
@pytest.mark.parametrize("spec", [arg_specs.BENCH[-1], WIDE, NARROW], ids=lambda spec: spec.name)
def test_forward_and_backward_compile_for_h100(spec, aot_target):
    loss = lambda q, k, v, table: run(spec, q, k, v, table).astype(jnp.float32).sum()
    compiled = aot.compile(jax.grad(loss, (0, 1, 2)), *spec.arguments(), target=aot_target)
    assert compiled.kernels.count("mosaic_gpu_v2") == 4


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_a_block_that_does_not_fit_is_refused_by_the_compiler_too(aot_target, monkeypatch):
    monkeypatch.setattr(hopper, "MEMORY", 1 << 20)
    monkeypatch.setattr(mosaic_gpu, "supported", lambda *args: None)
    spec = dataclasses.replace(arg_specs.BENCH[-1], block_k=256)
    with pytest.raises(Exception, match="(?i)shared memory|smem|RESOURCE_EXHAUSTED"):
        aot.compile(functools.partial(run, spec), *spec.arguments(), target=aot_target)
