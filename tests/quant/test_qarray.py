import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.errors import PlanError, RuleError
from flora_jax.quant.qarray import quantize_array


def r(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def test_int4_bytes_by_hand():
    """Block of 4: byte 0 = code 0 low, code 2 high; byte 1 = code 1 low, code 3 high."""
    fmt = flora.Format("int4", block=4)
    codes = jnp.array([[1], [-2], [7], [-7]], jnp.int8)
    stored = fmt.pack(codes, 4, -2)
    assert stored.astype(jnp.uint8).tolist() == [[0x71], [0x9E]]
    np.testing.assert_array_equal(fmt.unpack(stored, 4, -2), codes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.integers(1, 3), st.sampled_from([-1, -2]))
def test_every_code_survives_packing(blocks, block, columns, axis):
    shape = [columns, columns]
    shape[axis] = blocks * block
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    fmt = flora.Format("int4", block=block)
    stored = fmt.pack(jnp.asarray(codes), block, axis)
    assert stored.size * 2 == codes.size
    np.testing.assert_array_equal(fmt.unpack(stored, block, axis), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("block", [None, 8])
def test_error_is_half_a_step(name, symmetric, block):
    w = r(32, 12) + (0.0 if symmetric else 2.0)
    q = quantize_array(w, flora.Format(name, block=block, symmetric=symmetric), 0)
    assert q.shape == (32, 12) and q.block == (block or 32)
    step = np.repeat(np.asarray(q.scale), q.block, axis=0)
    # A zero point is rounded to a code as well, so the asymmetric range may lose half a step.
    assert (np.abs(q.dense() - w) <= (0.5 if symmetric else 1.0) * step + 1e-5).all()
    again = quantize_array(q.dense(), q.fmt, q.axis)
    np.testing.assert_allclose(again.dense(), q.dense(), atol=1e-4)


def test_zeros_stay_zero():
    q = quantize_array(jnp.zeros((8, 2)), flora.Format("int4"), 0)
    assert (q.dense() == 0).all()


def test_every_contraction_takes_it():
    fmt = flora.Format("int4", block=4)
    cases = [
        (r(8, 6), 0, lambda w: ops.dot(r(3, 8), w)),
        (r(8, 2, 4), 0, lambda w: ops.einsum("BTD,DNH->BTNH", r(1, 3, 8), w)),
        (r(3, 3, 8, 6), 2, lambda w: ops.conv(r(1, 5, 5, 8), w)),
        (r(9, 8), 1, lambda w: ops.embed(jnp.array([[1, 8]]), w)),
        (r(9, 8), 1, lambda w: ops.attend(r(3, 8), w)),
    ]
    for w, axis, call in cases:
        q = quantize_array(w, fmt, axis)
        np.testing.assert_allclose(call(q), call(q.dense()), atol=1e-5)


def test_stack_slices_like_an_array_and_memory_is_half_a_byte():
    w = r(3, 64, 32)
    params = {"layers": {"up": {"kernel": w}, "bias": jnp.ones((3, 32))}}
    q = flora.quantize(params, {".*/kernel": flora.Format("int4", block=32)})
    leaf = q["layers"]["up"]["kernel"]
    assert leaf.nbytes == w.size // 2 + 4 * w.size // 32
    compiled = (
        jax.jit(lambda p, x: ops.dot(x, jax.tree.map(lambda a: a[1], p)))
        .lower(leaf, r(2, 64))
        .compile()
    )
    assert compiled.memory_analysis().argument_size_in_bytes == leaf.nbytes + 2 * 64 * 4
    one = jax.tree.map(lambda a: a[1], leaf)
    np.testing.assert_allclose(one.dense(), leaf.dense()[1], atol=0)
    plain = flora.dequantize(q)["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(plain, leaf.dense())


def test_messages():
    params = {"up": {"kernel": r(10, 4), "bias": r(4)}}
    with pytest.raises(PlanError, match="up/kernel: int4 blocks of 4 do not divide"):
        flora.quantize(params, {".*/kernel": flora.Format("int4", block=4)})
    with pytest.raises(PlanError, match="up/bias: .* is not quantised"):
        flora.quantize(params, {".*/bias": flora.Format("int8")})
    with pytest.raises(RuleError, match="matches nothing"):
        flora.quantize(params, {".*/kernal": flora.Format("int8")})
    with pytest.raises(PlanError, match="unknown format 'int5'; nearest: int"):
        flora.Format("int5")
    with pytest.raises(PlanError, match="even for int4"):
        flora.Format("int4", block=3)
