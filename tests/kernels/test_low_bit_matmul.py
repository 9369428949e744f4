"""Products with low-bit weights: the stated error bounds, exact integers, gradients.

Packing is in test_low_bit_packing.py, the Pallas forms in test_low_bit_pallas.py and _gpu.py.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_bit import FORMATS, RNG, codes_of, exact, normal, weight

from flora_jax.core.errors import ConfigError, PlanError
from flora_jax.kernels import dispatch
from flora_jax.kernels.low_bit_matmul import (
    Rows,
    low_bit,
    low_bit_matmul,
    quantize,
    quantize_rows,
    tiles,
    xla,
)

# Weight-only products: |err| <= (K 2^-24 + u) sum |x| |w|, u the unit roundoff of the dtype


@pytest.mark.parametrize("dtype, u", [("float32", 2.0**-24), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("format, group, symmetric", FORMATS)
def test_floats_within_the_bound(format, group, symmetric, dtype, u):
    w, x = weight(format, group, symmetric), normal(5, 256, dtype=dtype)
    dense, rows = exact(w), np.asarray(x, np.float64)
    bound = (256 * 2.0**-24 + u) * (np.abs(rows) @ np.abs(dense))
    for implementation in ("reference", "xla"):
        y = low_bit_matmul(x, w, implementation=implementation)
        assert y.dtype == x.dtype
        assert np.all(np.abs(np.asarray(y, np.float64) - rows @ dense) <= bound)


def test_scales_on_the_product_keep_the_weights_exact():
    """Placement ``partial`` loses only the result's rounding; ``weight`` rounds weights as well."""
    w, x = weight(group=64), normal(7, 256, dtype=jnp.bfloat16)
    truth = np.asarray(x, np.float64) @ exact(w)
    errors = {}
    for placement in tiles.PLACEMENTS:
        y = low_bit_matmul(x, w, placement=placement, dtype=jnp.float32)
        errors[placement] = np.abs(np.asarray(y) - truth).max() / np.abs(truth).max()
        spec = low_bit_matmul(
            x, w, placement=placement, dtype=jnp.float32, implementation="reference"
        )
        np.testing.assert_allclose(y, spec, rtol=1e-5, atol=1e-4)
    assert errors["partial"] < 1e-6 < 1e-4 < errors["weight"] < 1e-2


# Quantised rows


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("x_zero", [False, True])
@pytest.mark.parametrize("w_zero", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integers_are_those_of_int64(format, w_zero, x_zero, implementation):
    """Also over groups: with scales of 1 every float32 sum here is an integer below 2^24."""
    codes, x = codes_of(format), codes_of("int8", 5, 256)
    zero = codes_of(format, 4, 24) if w_zero else None
    offset = jnp.asarray(RNG.integers(-128, 128, (5, 1)), jnp.int8) if x_zero else None
    w = low_bit(codes, jnp.ones((4, 24)), zero, format=format)
    rows = Rows(values=x, scale=jnp.ones((5, 1)), zero=offset)
    left = np.asarray(x, np.int64) - (np.asarray(offset, np.int64) if x_zero else 0)
    truth = left @ exact(w, scaled=False).astype(np.int64)
    y = low_bit_matmul(rows, w, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y, np.int64), truth)


def test_the_scales_of_rows_and_columns_come_after_the_integer():
    w, x = weight("int8", None), normal(2, 3, 256)
    rows = quantize_rows(x)
    integer = np.asarray(rows.values, np.int64) @ np.asarray(w.codes(), np.int64)
    expected = integer.astype(np.float32) * np.asarray(w.scale) * np.asarray(rows.scale)
    for y in (low_bit_matmul(rows, w), low_bit_matmul(x, w, x_format="int8")):
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("format, group", [("float8_e4m3fn", None), ("int4", 64)])
def test_float8_rows_within_the_bound(format, group, implementation):
    """int4 codes and their differences to a zero point are float8 numbers: nothing is rounded."""
    w = weight(format, group, symmetric=format != "int4")
    rows = quantize_rows(normal(5, 256), "float8_e4m3fn")
    left = np.asarray(rows.values.astype(jnp.float32), np.float64)
    bound = 256 * 2.0**-24 * (np.abs(left) @ np.abs(exact(w))) * np.asarray(rows.scale)
    y = np.asarray(low_bit_matmul(rows, w, implementation=implementation), np.float64)
    assert np.all(np.abs(y - (left @ exact(w)) * np.asarray(rows.scale)) <= bound)


def test_a_table_of_float8_weights_is_the_other_placement():
    """FireQ's form: float8 scales, weights rounded to float8 after scaling, 16 values a group."""
    w = weight("int4", 64)
    scale = (w.scale * 8).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    w = dataclasses.replace(w, scale=scale)
    rows = quantize_rows(normal(5, 256), "float8_e4m3fn")
    table = np.asarray(w.dense(jnp.float8_e4m3fn).astype(jnp.float32), np.float64)
    left = np.asarray(rows.values.astype(jnp.float32), np.float64) * np.asarray(rows.scale)
    for implementation in ("reference", "xla"):
        y = low_bit_matmul(rows, w, placement="weight", implementation=implementation)
        np.testing.assert_allclose(y, left @ table, rtol=1e-5, atol=1e-4)
    exact_form = np.abs(low_bit_matmul(rows, w) - left @ exact(w)).max()
    assert exact_form < 1e-3 < np.abs(y - left @ exact(w)).max()


# Properties


def test_powers_of_two_in_the_scale_pass_through():
    x, w = normal(3, 256), weight(symmetric=False)
    larger = dataclasses.replace(w, scale=w.scale * 8)
    np.testing.assert_array_equal(low_bit_matmul(x, larger), 8 * low_bit_matmul(x, w))


def test_one_hot_rows_give_the_dequantised_rows():
    picked = [0, 63, 64, 200, 255]
    x = jnp.zeros((5, 256)).at[jnp.arange(5), jnp.asarray(picked)].set(1.0)
    for format, group, symmetric in FORMATS:
        w = weight(format, group, symmetric)
        np.testing.assert_array_equal(low_bit_matmul(x, w), w.dense()[jnp.asarray(picked)])


def test_lowest_codes_zero_codes_and_padding_at_the_zero_point():
    x, scale = normal(2, 64), jnp.full((1, 3), 0.5)
    lowest = low_bit(jnp.full((64, 3), -8), scale, format="int4")
    np.testing.assert_allclose(low_bit_matmul(x, lowest)[:, 0], -4 * x.sum(1), rtol=1e-5, atol=1e-5)
    for codes, zero in [(0, None), (5, jnp.full((1, 3), 5, jnp.int8))]:
        nothing = low_bit(jnp.full((64, 3), codes), scale, zero, format="int4")
        np.testing.assert_array_equal(low_bit_matmul(x, nothing), 0.0)


def test_columns_are_independent():
    x, order = normal(1, 256), RNG.permutation(24)
    w = weight(symmetric=False)
    moved = jax.tree.map(lambda a: a[:, order], w)
    np.testing.assert_allclose(
        low_bit_matmul(x, moved), low_bit_matmul(x, w)[:, order], rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("format, group", [("int4", 64), ("int4", None), ("int8", 32)])
def test_blocks_change_nothing(format, group, monkeypatch):
    w, x = weight(format, group, k=512, n=24), normal(3, 512)
    dy = normal(3, 24)
    whole = low_bit_matmul(x, w, bias=dy[0]), xla.dx(dy, w, dtype=jnp.float32)
    monkeypatch.setattr(xla, "BLOCK", 512 * 8)
    assert xla.divisor(24, xla.BLOCK // 512) == 8
    parts = low_bit_matmul(x, w, bias=dy[0]), xla.dx(dy, w, dtype=jnp.float32)
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# Gradients


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("format, group, symmetric", FORMATS[:2] + FORMATS[4:5] + FORMATS[7:])
def test_gradients_are_those_of_the_dense_product(format, group, symmetric, activation):
    """By x, by the bias and, where asked for, by the scales."""
    w, x, bias = weight(format, group, symmetric, n=8), normal(3, 256), normal(8)
    act = tiles.ACTIVATIONS.get(activation, lambda y: y)
    moved = lambda scale: dataclasses.replace(w, scale=scale)
    loss = lambda y: jnp.sum(jnp.sin(y))
    ours = lambda x, s, b: loss(
        low_bit_matmul(x, moved(s), bias=b, activation=activation, frozen=False)
    )
    dense = lambda x, s, b: loss(act(x @ moved(s).dense() + b))
    got = jax.jit(jax.grad(ours, (0, 1, 2)))(x, w.scale, bias)
    want = jax.jit(jax.grad(dense, (0, 1, 2)))(x, w.scale, bias)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))
    constant = jax.grad(lambda s: loss(low_bit_matmul(x, moved(s))))(w.scale)
    np.testing.assert_array_equal(constant, 0.0)


@pytest.mark.parametrize("x_format, format", [("int8", "int4"), ("float8_e4m3fn", "int4")])
def test_rounded_rows_pass_their_gradient_straight_through(x_format, format):
    w, x = weight(format, n=8), normal(3, 256)
    dx = jax.grad(lambda x: low_bit_matmul(x, w, x_format=x_format).sum())(x)
    np.testing.assert_allclose(dx, jnp.ones((3, 8)) @ w.dense().T, rtol=1e-5, atol=1e-5)


def test_training_computes_what_serving_computes():
    w, x = weight(), normal(3, 256, dtype=jnp.bfloat16)
    f = lambda x: low_bit_matmul(x, w, bias=jnp.ones(24), activation="gelu")
    np.testing.assert_array_equal(jax.vjp(f, x)[0], f(x))


def test_the_gradient_of_the_weight_is_never_formed():
    """Nothing in the program of the gradient by x is K x N but the dequantised block."""
    w, x = weight(k=512, n=96), normal(3, 512, dtype=jnp.bfloat16)
    grad = jax.grad(lambda x, w: low_bit_matmul(x, w).astype(jnp.float32).sum())
    text = str(jax.make_jaxpr(grad)(x, w))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and not any("[512,96] = dot_general" in p for p in products)


def test_scanned_rematerialised_layers():
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(weight(k=64, n=64, group=32) for _ in range(3)))
    x = normal(2, 64)

    def loss(x, of):
        step = jax.checkpoint(lambda h, w: (jnp.tanh(of(h, w)), None))
        return jax.lax.scan(step, x, stack)[0].sum()

    got = jax.jit(jax.grad(lambda x: loss(x, low_bit_matmul)))(x)
    want = jax.jit(jax.grad(lambda x: loss(x, lambda h, w: h @ w.dense())))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_vmap_over_weights_and_rows():
    experts = jax.tree.map(lambda *a: jnp.stack(a), *(weight(k=64, n=8) for _ in range(3)))
    x = normal(3, 2, 64)
    got = jax.vmap(low_bit_matmul)(x, experts)
    np.testing.assert_allclose(got, jnp.einsum("bmk,bkn->bmn", x, experts.dense()), atol=1e-4)
    one = jax.tree.map(lambda a: a[0], experts)
    np.testing.assert_allclose(
        jax.vmap(lambda x: low_bit_matmul(x, one))(x), low_bit_matmul(x, one), atol=1e-5
    )


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from flora_jax.kernels.low_bit_matmul import low_bit_matmul, quantize
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
x, w0 = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 512), (512, 16)]))
w = quantize(w0, "int4", group=64, tile=256)
whole = low_bit_matmul(x, w)
rows = lambda x, w: low_bit_matmul(x, w, x_format="int8")
by_n = jax.shard_map(low_bit_matmul, mesh=mesh, in_specs=(P(), P(None, "d")),
                     out_specs=P(None, "d"))
by_k = jax.shard_map(lambda x, w: jax.lax.psum(low_bit_matmul(x, w), "d"), mesh=mesh,
                     in_specs=(P(None, "d"), P("d", None)), out_specs=P())
for f in (by_n, by_k):
    np.testing.assert_allclose(jax.jit(f)(x, w), whole, atol=1e-4)
    grad = jax.jit(jax.grad(lambda x: f(x, w).sum()))(x)
    np.testing.assert_allclose(grad, jnp.ones((4, 16)) @ w.dense().T, atol=1e-4)
by_n = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P(None, "d")), out_specs=P(None, "d"))
np.testing.assert_allclose(by_n(x, w), rows(x, w), rtol=1e-6, atol=1e-4)
print("ok")
"""


def test_columns_and_tiles_of_rows_over_two_devices():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "ok\n", done.stderr


# What is refused


def test_what_does_not_multiply_is_refused():
    w, x = weight(), normal(3, 256)
    with pytest.raises(PlanError, match=r"x \(3, 255\) and a weight \(256, 24\)"):
        low_bit_matmul(x[:, 1:], w)
    with pytest.raises(PlanError, match=r"a bias \(3,\) for 24 columns"):
        low_bit_matmul(x, w, bias=jnp.ones(3))
    with pytest.raises(ConfigError, match="'swish'"):
        low_bit_matmul(x, w, activation="swish")
    with pytest.raises(ConfigError, match="'weights'; nearest: weight"):
        low_bit_matmul(x, w, placement="weights")
    with pytest.raises(PlanError, match="'int9'; nearest: int8"):
        low_bit_matmul(x, w, x_format="int9")
    with pytest.raises(PlanError, match="float8_e4m3fn rows do not multiply int8 weights"):
        low_bit_matmul(x, weight("int8"), x_format="float8_e4m3fn")
    with pytest.raises(PlanError, match="floats, or Rows"):
        low_bit_matmul(codes_of("int8", 3, 256), w)
    with pytest.raises(PlanError, match="Rows have no gradient"):
        jax.grad(lambda s: low_bit_matmul(Rows(values=quantize_rows(x).values, scale=s), w).sum())(
            jnp.ones((3, 1))
        )
    long = jax.eval_shape(lambda: quantize(jnp.zeros((140000, 1)), "int8"))
    with pytest.raises(PlanError, match="140000 products of int8 overflows"):
        jax.eval_shape(
            lambda x, w: low_bit_matmul(x, w, x_format="int8"), jnp.ones((1, 140000)), long
        )


def test_a_forced_implementation_is_final():
    with pytest.raises(NotImplementedError, match="low_bit_matmul: mosaic_gpu"):
        low_bit_matmul(normal(3, 256), weight(), implementation="mosaic_gpu")
    with dispatch.use("reference"):
        assert low_bit_matmul(normal(3, 256), weight()).shape == (3, 24)
