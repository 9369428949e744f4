"""The Hopper kernels of low_bit_matmul: tile arithmetic, jax's GPU interpreter, compiled for H100.

The interpreter, which jax has since 0.12, runs everything but the matrix unit (see ``_product``).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import aot, dispatch, hopper
from flora_jax.kernels.low_bit_matmul import (
    Rows,
    arg_specs,
    cuts,
    low_bit,
    low_bit_matmul,
    mosaic_gpu,
    pack,
    quantize,
    tiles,
)
from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts

RNG = np.random.default_rng(0)
rounded = jax.jit(quantize, static_argnums=1, static_argnames=("group", "symmetric", "tile"))


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(RNG.standard_normal(shape, np.float32)).astype(dtype)


# The arithmetic of a tile


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_of_every_byte_are_its_codes(dtype):
    every = jnp.arange(-128, 128, dtype=jnp.int8)[:, None]
    halves = tiles.halves(every, jnp.dtype(dtype))
    for got, unit, codes in zip(halves, tiles.UNITS, tiles.nibbles(every)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32) * unit, codes)


@pytest.mark.parametrize("unit", tiles.UNITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_differences_to_zero_points_are_exact_and_scales_round_once(unit, axis):
    codes = jnp.asarray(RNG.integers(-8, 8, (16, 8)))
    zero = jnp.asarray(RNG.integers(-128, 128, (16, 8)[axis]), jnp.int8)
    scale = jnp.asarray(RNG.random((16, 8)[axis]), jnp.float32)
    expand = (lambda v: v[:, None]) if axis == 0 else (lambda v: v[None])
    given = (codes / unit).astype(jnp.bfloat16)
    centred = tiles.centred(given, zero, unit, axis)
    exact = codes - expand(zero.astype(jnp.int32))
    np.testing.assert_array_equal(centred.astype(jnp.float32) * unit, exact)
    got = tiles.rescaled(centred, scale * unit, axis)
    np.testing.assert_array_equal(got, (exact * expand(scale)).astype(jnp.bfloat16))


def test_steps_of_a_group_are_added_in_int32():
    """Beyond 2^24, where float32 sums would round."""
    steps = jnp.asarray(RNG.integers(-(2**23), 2**23, (8, 3)), jnp.float32)
    steps = steps.at[:4, 0].set(2.0**23 - 1)
    carried, got = jnp.zeros(3, jnp.int32), []
    for t, y in enumerate(steps):
        y, carried = tiles.whole_group(y, carried, jnp.array((t + 1) % 4 == 0))
        got.append(y)
    exact = np.asarray(steps, np.int64).reshape(2, 4, 3).sum(1).astype(np.float32)
    np.testing.assert_array_equal(np.stack(got)[3::4], exact)
    np.testing.assert_array_equal(np.delete(np.stack(got), [3, 7], 0), 0.0)


# Cuts


@pytest.mark.parametrize("k, tile, group", [(1024, 512, 128), (512, 256, 512), (256, 256, 64)])
def test_every_weight_row_belongs_to_one_step_and_its_group(k, tile, group):
    rows = jnp.arange(k)
    # The parities of row numbers and of halves, packed, say where each row went.
    stored = pack(((rows // 32) % 8)[:, None].astype(jnp.int8), tile)
    w = rounded(normal(k, 64), "int4", group=group, tile=tile)
    cut = cuts.forward(4, w)
    found = []
    for step in range(cut.steps * cut.splits):
        at = step * cut.k
        for part, codes in enumerate(tiles.nibbles(stored[at : at + cut.k])):
            row = int(cuts.weight_row(w, at, part))
            np.testing.assert_array_equal(codes[:, 0], (rows[row : row + cut.k] // 32) % 8)
            assert row // group == (row + cut.k - 1) // group
            found += range(row, row + cut.k)
    assert sorted(found) == list(range(k))


@pytest.mark.parametrize("spec", arg_specs.LARGE, ids=lambda spec: spec.name)
def test_the_benchmark_s_products_fill_the_device(spec):
    w, integer = spec.weight(), spec.x_format == "int8"
    cut = cuts.forward(spec.m, w, whole_groups=integer)
    assert cut.rows * cut.m >= spec.m and cut.steps * cut.splits * cut.k * parts(w) == spec.k
    assert spec.n // cut.n * cut.rows * cut.splits >= (112 if integer else 132)
    back = cuts.dx(spec.m, w)
    assert back.steps * back.splits * back.n == spec.n
    assert spec.k // parts(w) // back.k * back.rows * back.splits >= 132


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


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_an_oversized_block_is_refused(aot_target):
    spec = arg_specs.Spec(m=256, k=4096, n=14336, format="int8")
    f = program(spec, "forward", blocks=Blocks(m=256, k=1024, n=128))
    with pytest.raises(Exception, match="(?i)shared memory|smem|RESOURCE_EXHAUSTED"):
        aot.compile(f, spec.x(), spec.weight(), target=aot_target)
