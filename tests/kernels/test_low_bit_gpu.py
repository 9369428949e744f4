"""The Hopper kernels of low_bit_matmul: jax's GPU interpreter, compiled for H100.

The interpreter, which jax has since 0.12, runs everything but the matrix unit
(see ``program.product``).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from low_bit import RNG, rounded, rows_of
from low_bit import normal as low_bit_normal

from flora_jax.kernels import aot, dispatch, hopper
from flora_jax.kernels.low_bit_matmul import (
    Rows,
    arg_specs,
    cuts,
    low_bit,
    low_bit_matmul,
    mosaic_gpu,
)
from flora_jax.kernels.low_bit_matmul.blocks import Blocks


def normal(*shape, dtype=jnp.bfloat16):
    return low_bit_normal(*shape, dtype=dtype)


# The kernels in jax's interpreter


@pytest.fixture
def interpreted(request, monkeypatch):
    """As many programs, or sums are split; with one, a single buffer, filled again at each step."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("jax's GPU interpreter is public since 0.12")
    monkeypatch.setattr(cuts, "PROGRAMS", request.param)
    if request.param == 1:
        monkeypatch.setattr(hopper, "slots", lambda *sizes: 1)
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        yield


# programs, format, group, symmetric, tile, rows of x: one warpgroup and two; groups of a step, of
# several, of everything; a tile and two
CASES = [
    (1, "int4", 64, False, 256, 11),
    (8, "int4", None, True, 512, 40),
    (1, "int8", 128, False, None, 40),
    (8, "float8_e4m3fn", None, True, None, 11),
]


@pytest.mark.parametrize(
    "interpreted, format, group, symmetric, tile, m", CASES, indirect=["interpreted"]
)
@pytest.mark.interpreter
def test_forward_and_gradient(interpreted, format, group, symmetric, tile, m):
    k = 512 if format == "int4" else 256
    w = rounded(normal(k, 128), format, group=group, symmetric=symmetric, tile=tile)
    x, bias = normal(m, k), normal(128, dtype=jnp.float32)

    def f(x, implementation):
        given = {"bias": bias, "activation": "relu", "dtype": jnp.float32}
        return low_bit_matmul(x, w, implementation=implementation, **given)

    y, pull = jax.vjp(lambda x: f(x, "mosaic_gpu"), x)
    spec, pull_spec = jax.vjp(lambda x: f(x, "reference"), x)
    np.testing.assert_allclose(y, spec, rtol=1e-5, atol=2e-4)
    dx, truth = (np.asarray(g(spec)[0], np.float32) for g in (pull, pull_spec))
    # dx multiplies weights rounded to bfloat16.
    assert np.linalg.norm(dx - truth) <= 5e-3 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    "interpreted, tile, group",
    [(1, 256, 128), (1, 256, 256), (8, 512, 512), (1, 256, 512)],
    indirect=["interpreted"],
)
@pytest.mark.interpreter
def test_integers_are_those_of_int64(interpreted, tile, group):
    """With zero points of rows and weights; a group is one step or several, of one nibble or both.

    One group in all has its scale on the whole sum, rounded once.
    """
    draw = lambda low, high, *shape: jnp.asarray(RNG.integers(low, high, shape), jnp.int8)
    k = max(group, tile) if group > 128 else 512
    count = k // group
    codes, zero = draw(-8, 8, k, 64), draw(-8, 8, count, 64)
    scale = RNG.random((1, 64), np.float32) if count == 1 else np.ones((count, 64), np.float32)
    w = low_bit(codes, scale, zero, format="int4", tile=tile)
    rows = Rows(values=draw(-128, 128, 5, k), scale=jnp.ones((5, 1)), zero=draw(-128, 128, 5, 1))
    y = low_bit_matmul(rows, w, implementation="mosaic_gpu")
    wide = np.asarray(codes, np.int64) - np.repeat(np.asarray(zero, np.int64), group, 0)
    truth = (np.asarray(rows.values, np.int64) - np.asarray(rows.zero, np.int64)) @ wide
    np.testing.assert_array_equal(y, truth.astype(np.float32) * scale[:1])


@pytest.fixture
def eight(monkeypatch):
    """The 8-bit unit wherever it can be used."""
    monkeypatch.setattr(cuts, "CLEARLY", math.inf)


EIGHT = [(8, "int8", None, None), (1, "int4", 128, 256), (1, "int4", None, 512)]


@pytest.mark.parametrize("interpreted, format, group, tile", EIGHT, indirect=["interpreted"])
@pytest.mark.interpreter
def test_integers_in_8_bits_are_those_of_int64(interpreted, eight, format, group, tile):
    """Sums of one group beyond 2^24, where those of float32 would round."""
    top, k = (8, 512) if format == "int4" else (128, 2048)
    draw = lambda low, high, *shape: jnp.asarray(RNG.integers(low, high, shape), jnp.int8)
    codes = draw(-top, top, k, 128).at[:, 0].set(top - 1)
    count = k // (group or k)
    scale = RNG.random((1, 128), np.float32) if count == 1 else np.ones((count, 128), np.float32)
    w = low_bit(codes, scale, format=format, tile=tile)
    x = draw(-128, 128, 40, k).at[0].set(127)
    rows = Rows(values=x, scale=jnp.ones((40, 1)))
    assert cuts.choose(rows, w, jnp.float32).bits == 8
    y = low_bit_matmul(rows, w, implementation="mosaic_gpu")
    truth = np.asarray(x, np.int64) @ np.asarray(codes, np.int64)
    np.testing.assert_array_equal(y, truth.astype(np.float32) * scale[:1])


@pytest.mark.parametrize(
    "interpreted, format, group, tile",
    [(8, "float8_e4m3fn", None, None), (1, "float8_e4m3fn", 256, None), (1, "int4", 128, 512)],
    indirect=["interpreted"],
)
@pytest.mark.interpreter
def test_float8_rows_in_8_bits(interpreted, eight, format, group, tile):
    """With the scales of rows, a bias and an activation; sums in one program and in several."""
    w = rounded(normal(512, 128), format, group=group, tile=tile)
    x, bias = normal(40, 512), normal(128, dtype=jnp.float32)

    def f(implementation):
        given = {"bias": bias, "activation": "relu", "dtype": jnp.float32}
        return low_bit_matmul(
            x, w, x_format="float8_e4m3fn", implementation=implementation, **given
        )

    np.testing.assert_allclose(f("mosaic_gpu"), f("reference"), rtol=1e-5, atol=2e-4)


# What is refused


def test_what_cannot_run_says_why():
    forced = lambda x, w, **given: low_bit_matmul(x, w, implementation="mosaic_gpu", **given)
    w, x = rounded(normal(256, 128), "int4", group=128), normal(3, 256)
    with dispatch.target("sm90"):
        with pytest.raises(NotImplementedError, match="quantised rows, not float32"):
            forced(x.astype(jnp.float32), w)
        with pytest.raises(NotImplementedError, match="groups of 16 and pieces of 128 rows"):
            forced(x, rounded(normal(256, 128), "int4", group=16))
        with pytest.raises(NotImplementedError, match="96 columns in blocks of 64"):
            forced(x, rounded(normal(256, 96), "int4", group=128))
        with pytest.raises(NotImplementedError, match="steps of 96 rows in groups of 128"):
            forced(x, w, blocks=Blocks(m=8, k=96, n=64))
        with pytest.raises(NotImplementedError, match="m=12: a multiple of 8"):
            forced(x, w, blocks=Blocks(m=12, k=64, n=64))
        narrow = rounded(normal(256, 128), "int4", group=32)
        with pytest.raises(NotImplementedError, match="programs of 64 rows in groups of 32"):
            mosaic_gpu.dx(normal(3, 128), narrow, dtype=jnp.bfloat16)


def test_runs_only_when_asked_for():
    """No device has run it yet, so a Hopper GPU takes the XLA form by itself."""
    w, x = rounded(normal(256, 128), "int4", group=128), normal(3, 256)
    with dispatch.target("sm90"):
        assert "wgmma" not in str(jax.make_jaxpr(low_bit_matmul)(x, w))
        asked = lambda x, w: low_bit_matmul(x, w, implementation="mosaic_gpu")
        assert "wgmma" in str(jax.make_jaxpr(asked)(x, w))


def test_many_rows_go_to_xla_unless_the_kernel_alone_is_asked_for():
    spec = arg_specs.Spec(m=1024, k=4096, n=14336, format="int8")
    args = spec.x(), spec.weight()
    product = lambda choice: lambda x, w: low_bit_matmul(x, w, implementation=choice)
    gradient = lambda choice: jax.grad(lambda x, w: product(choice)(x, w).sum().astype(float))
    text = lambda f: str(jax.make_jaxpr(f)(*args))
    with dispatch.target("sm90"):
        for way in (product, gradient):
            assert "wgmma" in text(way("mosaic_gpu"))
            either = text(way(("mosaic_gpu", "xla")))
            # All of the weight at once.
            assert "wgmma" not in either and "while" not in either


# Compiled


def program(spec, direction, **given):
    f = lambda x, w: low_bit_matmul(
        x, w, x_format=spec.x_format, implementation="mosaic_gpu", **given
    )
    if direction == "forward":
        return f
    return jax.grad(lambda x, w: f(x, w).astype(jnp.float32).sum())


COMPILED = [spec for spec in arg_specs.LARGE if spec.m == 16] + [
    spec for spec in arg_specs.LARGE if spec.m == 256 and spec.name[:4] in ("w4a1", "w8a8")
]


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_compiles_forward_and_backward(spec, aot_target):
    for direction in ("forward", "gradient"):
        got = aot.compile(program(spec, direction), spec.x(), spec.weight(), target=aot_target)
        assert got.kernels.count("mosaic_gpu_v2") == 1
        # Nothing of the size of the dense weight is written.
        assert got.temporary < spec.k * spec.n


EIGHT_BITS = [s for s in arg_specs.LARGE if s.m == 256 and s.x_format and s.name[:4] != "w8a8"]


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
@pytest.mark.parametrize("spec", EIGHT_BITS, ids=lambda spec: spec.name)
def test_compiles_in_8_bits(spec, aot_target):
    assert cuts.choose(rows_of(spec), spec.weight(), jnp.bfloat16).bits == 8
    got = aot.compile(program(spec, "forward"), spec.x(), spec.weight(), target=aot_target)
    assert got.kernels.count("mosaic_gpu_v2") == 1


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
@pytest.mark.parametrize("kind", [{"format": "int8"}, {"format": "int8", "x_format": "int8"}])
def test_many_rows_compile_as_one_product_of_xla(kind, aot_target):
    spec = arg_specs.Spec(m=1024, k=4096, n=14336, **kind)
    f = lambda x, w: low_bit_matmul(
        x, w, x_format=spec.x_format, implementation=("mosaic_gpu", "xla")
    )
    got = aot.compile(f, spec.x(), spec.weight(), target=aot_target)
    assert "mosaic_gpu_v2" not in got.kernels
    # The weight in bfloat16, or the result in int32.
    assert got.temporary <= 1.05 * max(2 * spec.k * spec.n, 4 * spec.m * spec.n)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_an_oversized_block_is_refused(aot_target):
    spec = arg_specs.Spec(m=256, k=4096, n=14336, format="int8")
    f = program(spec, "forward", blocks=Blocks(m=256, k=1024, n=128))
    with pytest.raises(Exception, match="(?i)shared memory|smem|RESOURCE_EXHAUSTED"):
        aot.compile(f, spec.x(), spec.weight(), target=aot_target)
