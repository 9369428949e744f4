"""The TPU kernels of low_bit_matmul: simulated with races and unwritten memory found, compiled.

The simulator fills what nobody wrote with NaN and reports reads that race with writes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.low_bit_matmul import (
    Rows,
    arg_specs,
    blocks,
    low_bit,
    low_bit_matmul,
    quantize,
    quantize_rows,
)
from flora_jax.kernels.low_bit_matmul.blocks import Blocks

RNG = np.random.default_rng(0)
rounded = jax.jit(quantize, static_argnums=1, static_argnames=("group", "symmetric", "tile"))


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape, np.float32)).astype(dtype)


@pytest.fixture
def simulated(capfd):
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with dispatch.interpret(mode), dispatch.use("pallas_tpu"):
        yield
    assert "RACE" not in capfd.readouterr().out.upper()


# format, group, symmetric, tile, K, blocks: steps inside a half tile, over tiles; groups within a
# step, a step within a group; 8 bits; all with rows and columns that blocks do not divide
CASES = [
    ("int4", 128, True, 512, 512, Blocks(m=8, k=128, n=128)),
    ("int4", 64, False, 256, 512, Blocks(m=11, k=128, n=128)),
    ("int4", None, False, 512, 512, Blocks(m=11, k=256, n=200)),
    ("int8", 128, False, None, 256, Blocks(m=8, k=128, n=128)),
    ("float8_e4m3fn", None, True, None, 256, Blocks(m=11, k=128, n=128)),
]


@pytest.mark.parametrize("format, group, symmetric, tile, k, size", CASES)
def test_forward_and_gradient(simulated, format, group, symmetric, tile, k, size):
    w = rounded(normal(k, 200), format, group=group, symmetric=symmetric, tile=tile)
    x, bias = normal(11, k), normal(200)

    def f(x, implementation=None):
        given = {"blocks": size, "implementation": implementation}
        return low_bit_matmul(x, w, bias=bias, activation="silu", **given)

    y, pull = jax.vjp(f, x)
    spec, pull_spec = jax.vjp(lambda x: f(x, "reference"), x)
    np.testing.assert_allclose(y, spec, rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(pull(y)[0], pull_spec(y)[0], rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("w_zero, x_zero", [(False, False), (True, False), (True, True)])
def test_integers_are_those_of_int64(simulated, w_zero, x_zero):
    codes = jnp.asarray(RNG.integers(-8, 8, (512, 130)), jnp.int8)
    x = jnp.asarray(RNG.integers(-128, 128, (5, 512)), jnp.int8)
    zero = jnp.asarray(RNG.integers(-8, 8, (4, 130)), jnp.int8) if w_zero else None
    w = low_bit(codes, jnp.ones((4, 130)), zero, format="int4")
    offset = np.repeat(np.asarray(zero), 128, 0).astype(np.int64) if w_zero else 0
    shift = jnp.asarray(RNG.integers(-128, 128, (5, 1)), jnp.int8) if x_zero else None
    rows = Rows(values=x, scale=jnp.ones((5, 1)), zero=shift)
    y = low_bit_matmul(rows, w, blocks=Blocks(m=5, k=128, n=128))
    wide = np.asarray(x, np.int64) - (np.asarray(shift, np.int64) if x_zero else 0)
    truth = wide @ (np.asarray(codes, np.int64) - offset)
    np.testing.assert_array_equal(np.asarray(y, np.int64), truth)


def test_float8_rows_and_chosen_blocks(simulated):
    w = rounded(normal(256, 24), "int4", group=128)
    x, rows = normal(3, 256), quantize_rows(normal(3, 256), "float8_e4m3fn")
    for given in (rows, x):
        spec = low_bit_matmul(given, w, implementation="reference")
        np.testing.assert_allclose(low_bit_matmul(given, w), spec, rtol=1e-5, atol=1e-4)


def test_vmapped_rows():
    w, x = rounded(normal(256, 24), "int4", group=128), normal(2, 3, 256)
    with dispatch.interpret(), dispatch.use("pallas_tpu"):
        y = jax.jit(jax.vmap(lambda x: low_bit_matmul(x, w)))(x)
    np.testing.assert_allclose(y, low_bit_matmul(x, w), rtol=1e-5, atol=1e-4)


def test_blocks_that_do_not_fit_are_refused_and_odd_shapes_fall_back():
    w, x = rounded(normal(512, 200), "int4", group=128), normal(3, 512)
    with dispatch.target("tpu"):
        for size, reason in [
            (Blocks(m=8, k=96, n=128), "k=96 does not divide the 256 stored rows"),
            (Blocks(m=8, k=64, n=128), "k=64 is no multiple of 128"),
            (Blocks(m=8, k=128, n=100), "n=100 is no multiple of 128"),
        ]:
            with pytest.raises(NotImplementedError, match=reason):
                low_bit_matmul(x, w, blocks=size, implementation="pallas_tpu")
        # Their products of more rows are not exact in float32.
        zeros = Rows(values=jnp.zeros((3, 512), jnp.int8), scale=jnp.ones((3, 1)), zero=jnp.int8(1))
        with pytest.raises(NotImplementedError, match="k=512 takes more than 256 rows of a group"):
            size = Blocks(m=3, k=512, n=128)
            byte = rounded(normal(512, 200), "int8")
            low_bit_matmul(zeros, byte, blocks=size, implementation="pallas_tpu")
        small = rounded(normal(64, 24), "int4", group=32)
        with pytest.raises(NotImplementedError, match="k=16 is no multiple of 128"):
            low_bit_matmul(x[:, :64], small, implementation="pallas_tpu")
        assert low_bit_matmul(x[:, :64], small).shape == (3, 24)


@pytest.mark.parametrize("spec", arg_specs.LARGE, ids=lambda spec: spec.name)
def test_the_chosen_blocks_are_valid_and_not_tiny(spec):
    """A step moves enough bytes that its overhead does not rule."""
    w = spec.weight()
    x = jnp.dtype(spec.x_format or "bfloat16")
    size = blocks.choose(spec.m, w, x, jnp.bfloat16)
    assert blocks.refusal(w, size) is None
    assert blocks.memory(w, size, x, jnp.bfloat16) <= blocks.VMEM
    assert size.k * size.n >= 1 << 17


COMPILED = [spec for spec in arg_specs.LARGE if spec.m in (16, 256)]


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_compiles_forward_and_backward(spec, aot_target):
    x, w = spec.x(), spec.weight()
    f = lambda x, w: low_bit_matmul(x, w, x_format=spec.x_format, implementation="pallas_tpu")
    grad = jax.grad(lambda x, w: f(x, w).astype(jnp.float32).sum())
    for program in (f, grad):
        got = aot.compile(program, x, w, target=aot_target)
        assert "tpu_custom_call" in got.kernels
        # Nothing of the size of the dense weight is written.
        assert got.temporary < spec.k * spec.n


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e"], indirect=True)
def test_an_oversized_block_is_refused(aot_target):
    spec = arg_specs.Spec(m=16, k=4096, n=8192, format="int8")
    size = Blocks(m=16, k=4096, n=4096)
    f = lambda x, w: low_bit_matmul(x, w, blocks=size)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        aot.compile(f, spec.x(), spec.weight(), target=aot_target)
