"""What the Hopper kernels of low_bit_matmul are made of: tile arithmetic, cuts, the way to take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_bit import RNG, normal, rounded, rows_of

from flora_jax.core.errors import ConfigError
from flora_jax.kernels.low_bit_matmul import Rows, arg_specs, cuts, pack, tiles
from flora_jax.kernels.low_bit_matmul.blocks import Blocks, parts

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


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_every_byte_in_8_bits_is_its_codes(dtype):
    """As int4 or as it is; the products of integers and what they count are exact."""
    every = jnp.arange(-128, 128, dtype=jnp.int8)[:, None]
    got = tiles.eight_bits(every.astype(jnp.int16), "int4", jnp.dtype(dtype))
    for (numbers, unit), codes in zip(got, tiles.nibbles(every)):
        assert numbers.dtype == dtype
        np.testing.assert_array_equal(numbers.astype(jnp.float32) * unit, codes)
    ((same, unit),) = tiles.eight_bits(every.astype(jnp.int16), dtype, jnp.dtype(dtype))
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(same, jnp.int8), every)
    assert unit == 1


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


@pytest.mark.parametrize("spec", arg_specs.LARGE, ids=lambda spec: spec.name)
def test_a_cut_in_8_bits_covers_the_product_and_no_group_is_in_two_programs(spec):
    x, w = rows_of(spec), spec.weight()
    cut = cuts.forward8(x, w, jnp.bfloat16)
    if spec.x_format is None:
        assert cut is None
        return
    assert cut.bits == 8 and cut.k * cut.steps * cut.splits * parts(w) == spec.k
    assert cut.rows * cut.m >= spec.m and spec.n % cut.n == 0 and w.group % cut.k == 0
    if spec.x_format == "int8":
        assert cut.splits == 1 if w.groups == 1 else w.group == cut.k


def test_zero_points_and_groups_of_several_steps_take_16_bits():
    w, zero = rounded(normal(1024, 128), "int4", group=128, tile=512), jnp.ones((64, 1), jnp.int8)
    rows = Rows(values=jnp.ones((64, 1024), jnp.int8), scale=jnp.ones((64, 1)))
    assert cuts.forward8(rows, w, jnp.bfloat16).k == 128
    assert cuts.forward8(dataclasses.replace(rows, zero=zero), w, jnp.bfloat16) is None
    uncentred = rounded(normal(1024, 128), "int4", group=128, symmetric=False, tile=512)
    assert cuts.forward8(rows, uncentred, jnp.bfloat16) is None
    coarse = rounded(normal(1024, 128), "int8", group=256)
    assert cuts.forward8(rows, coarse, jnp.bfloat16) is None
    # A step is a whole group, but as two sums, of its low and of its high nibbles.
    halves = rounded(normal(1024, 128), "int4", group=256, tile=256)
    assert cuts.forward8(rows, halves, jnp.bfloat16) is None
    float8 = Rows(values=rows.values.astype(jnp.float8_e4m3fn), scale=rows.scale)
    narrow = rounded(normal(1024, 128), "float8_e4m3fn", group=256)
    assert cuts.forward8(float8, narrow, jnp.bfloat16).k == 128
    assert cuts.choose(float8, narrow, jnp.bfloat16, "weight").bits == 16


# Rows of x at which a product goes another way: the 8-bit unit from, XLA from.
ROUTES = [
    ({"format": "int4", "group": 128}, None, 2048),
    ({"format": "int8"}, None, 1024),
    ({"format": "float8_e4m3fn"}, None, 1024),
    ({"format": "int8", "x_format": "int8"}, 64, 1024),
    ({"format": "float8_e4m3fn", "x_format": "float8_e4m3fn"}, 64, 512),
    ({"format": "int4", "group": 128, "x_format": "float8_e4m3fn"}, 96, None),
    ({"format": "int4", "group": 128, "x_format": "int8"}, 64, None),
]


@pytest.mark.parametrize("kind, eight, xla", ROUTES)
def test_the_way_that_a_product_takes(kind, eight, xla):
    """By the estimates, of an 8-billion-parameter Llama's widening product."""
    for m in (1, 16, 32, 64, 96, 256, 512, 1024, 2048, 8192):
        spec = arg_specs.Spec(m=m, k=4096, n=14336, **kind)
        x, w = rows_of(spec), spec.weight()
        bits = cuts.choose(x, w, jnp.bfloat16).bits
        assert (bits == 8) == (eight is not None and m >= eight), m
        given = {"dtype": jnp.bfloat16, "placement": None}
        why = cuts.slower(x, w, None, blocks=None, **given)
        assert (why is not None) == (xla is not None and m >= xla), m
        assert why is None or why.startswith(f"{m} rows: about ")
        assert cuts.slower(x, w, None, blocks=Blocks(m=64, k=128, n=128), **given) is None


def test_blocks_say_which_unit():
    spec = arg_specs.Spec(m=256, k=4096, n=14336, format="int8", x_format="int8")
    x, w = rows_of(spec), spec.weight()
    of = lambda x, **given: cuts.choose(
        x, w, jnp.bfloat16, blocks=Blocks(m=64, k=128, n=128, **given)
    )
    assert (of(x).bits, of(x, bits=16).bits, of(x, bits=8).bits) == (8, 16, 8)
    with pytest.raises(NotImplementedError, match="8 bits: quantised rows"):
        of(spec.x(), bits=8)


def test_blocks_that_no_product_has_are_refused():
    with pytest.raises(ConfigError, match=r"Blocks\(m=0, .*: sizes of at least 1, 8 or 16 bits"):
        Blocks(m=0, k=128, n=128)
    with pytest.raises(ConfigError, match="bits=4"):
        Blocks(m=64, k=128, n=128, bits=4)


def test_steps_are_tiles_whose_sums_of_integers_are_exact():
    w = rounded(normal(512, 64), "int8", group=None)
    cut = lambda k, **how: cuts.forward(8, w, Blocks(m=8, k=k, n=64), **how)
    assert cut(512).k == 512 and cut(128, whole_groups=True).k == 128
    with pytest.raises(NotImplementedError, match="steps of 512 rows: at most 128"):
        cut(512, whole_groups=True)
    w = rounded(normal(192, 64), "int8", group=96)
    with pytest.raises(NotImplementedError, match="steps of 96 rows .*: 32 or multiples of 64"):
        cut(96)
