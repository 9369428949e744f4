"""Low-bit weights: packing, conversion from QArrays, a packed base under an adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from low_bit import FORMATS, RNG, normal, rounded

import flora_jax as flora
from flora_jax.core.contraction import Dot
from flora_jax.core.errors import PlanError
from flora_jax.core.leaf import contract
from flora_jax.core.spec import KernelSpec
from flora_jax.kernels.low_bit_matmul import (
    LowBit,
    from_qarray,
    from_qarrays,
    low_bit,
    pack,
    packing,
    quantize,
    tiles,
    unpack,
)
from flora_jax.quant import Format, quantize_array


@pytest.mark.parametrize("k, tile", [(8, 8), (24, 4), (24, 2), (512, 256)])
def test_a_byte_holds_a_row_and_the_row_half_a_tile_below(k, tile):
    codes = RNG.integers(-8, 8, (k, 3))
    expected = np.zeros((k // 2, 3), np.uint8)
    for row in range(k):
        t, r = divmod(row, tile)
        at, shift = t * (tile // 2) + r % (tile // 2), 4 * (r >= tile // 2)
        expected[at] |= ((codes[row] & 15) << shift).astype(np.uint8)
    stored = pack(jnp.asarray(codes), tile)
    np.testing.assert_array_equal(np.asarray(stored).view(np.uint8), expected)
    np.testing.assert_array_equal(unpack(stored, tile), codes)


def test_all_bytes_unpack():
    every = jnp.arange(-128, 128, dtype=jnp.int8)[:, None]
    low, high = tiles.nibbles(every)
    np.testing.assert_array_equal(jnp.concatenate([low, high]), unpack(every, 512))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_qarray_keeps_its_numbers_and_with_its_own_tile_its_bytes(symmetric):
    fmt = Format("int4", block=32, symmetric=symmetric)
    q = quantize_array(normal(2, 512, 12), fmt, -2)
    same, repacked = from_qarray(q, tile=32), from_qarray(q)
    assert same.values is q.values and repacked.tile == 512 and same.nbytes == q.nbytes
    for w in (same, repacked):
        np.testing.assert_array_equal(w.dense(), q.dense())
    q8 = quantize_array(normal(12, 6), Format("int8", symmetric=symmetric), -2)
    np.testing.assert_array_equal(from_qarray(q8).dense(), q8.dense())


def test_the_error_of_rounding_and_the_bytes():
    w0 = normal(256, 24)
    for format, group, symmetric in FORMATS:
        w = rounded(w0, format, group=group, symmetric=symmetric)
        step = np.abs(np.asarray(w.scale)).max() * (16.0 if format.startswith("float8") else 0.5)
        assert np.abs(w.dense() - w0).max() <= 1.01 * step
        assert w.values.nbytes == 256 * 24 * packing.BITS[format] // 8


def test_what_does_not_pack_is_refused():
    with pytest.raises(PlanError, match="7 rows in groups of 7 cannot be halved"):
        low_bit(jnp.zeros((7, 2), jnp.int8), jnp.ones((1, 2)), format="int4")
    with pytest.raises(PlanError, match="5 groups do not divide 12 rows"):
        low_bit(jnp.zeros((12, 2), jnp.int8), jnp.ones((5, 2)), format="int8")
    with pytest.raises(PlanError, match="tile=32 fits neither 48 rows nor their groups of 12"):
        low_bit(jnp.zeros((48, 2), jnp.int8), jnp.ones((4, 2)), format="int4", tile=32)
    with pytest.raises(PlanError, match="tiles of 6 rows do not pack 8 rows"):
        pack(jnp.zeros((8, 2), jnp.int8), 6)
    with pytest.raises(PlanError, match="'int5'; nearest: int"):
        quantize(jnp.ones((4, 4)), "int5")
    with pytest.raises(PlanError, match="symmetric only"):
        quantize(jnp.ones((4, 4)), "float8_e4m3fn", symmetric=False)
    with pytest.raises(PlanError, match="no zero point"):
        low_bit(jnp.ones((4, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), format="float8_e4m3fn")
    with pytest.raises(PlanError, match="not along the rows"):
        from_qarray(quantize_array(jnp.ones((4, 4)), Format("int8"), -1))


def test_a_quantised_base_under_an_adapter_multiplies_packed():
    """A layer of a quantised tree, LoRA on it: through the op, equal to the QArray's result."""
    params = {"dense": {"kernel": normal(64, 12)}, "embedding": normal(5, 64)}
    q = flora.quantize(params, {".*": flora.Format("int4", block=32)})
    low = from_qarrays(q)
    assert isinstance(low["dense"]["kernel"], LowBit)
    assert low["embedding"] is q["embedding"]
    plan = flora.plan(low, {"dense/kernel": flora.LoRA(rank=2)})
    adapters = jax.tree.map(lambda a: a + 0.1, flora.init(plan, jax.random.key(0), low))
    x, layer = normal(2, 64), Dot(KernelSpec.dense(), (64, 12))
    product = lambda tree: contract(layer, x, flora.bind(tree, adapters, plan)["dense"]["kernel"])
    np.testing.assert_allclose(product(low), product(q), rtol=1e-5, atol=1e-4)
    jaxpr = str(jax.make_jaxpr(lambda x: contract(layer, x, low["dense"]["kernel"]))(x))
    assert "custom_vjp_call" in jaxpr
