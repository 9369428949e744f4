"""OFT: orthogonality, the series, coft, dropout, patches, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_miss import LLAMA

import flora_jax as flora
from flora_jax.adapters.oft import cayley, cayley_neumann, skew
from flora_jax.core import ops
from flora_jax.core.errors import PlanError
from flora_jax.core.spec import KernelSpec


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def test_skew_fills_the_upper_triangle_row_by_row():
    q = skew(jnp.arange(1.0, 7.0)[None], 4)[0]
    np.testing.assert_array_equal(q[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(q[1], [-1, 0, 4, 5])
    np.testing.assert_array_equal(q, -q.T)


def test_the_exact_transform_is_orthogonal():
    q = skew(r(3, 10), 5)
    rotation = cayley(q)
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(1, 2), np.broadcast_to(np.eye(5), (3, 5, 5)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-5)
    by_hand = (np.eye(5) - q) @ np.linalg.inv(np.eye(5) + q)
    np.testing.assert_allclose(rotation, by_hand, atol=1e-5)


def test_the_series_and_its_last_term():
    """Terms 2 to 6 written out; three equal four; it tends to (I + Q)(I - Q)^-1."""
    q = 0.1 * skew(r(10), 5)
    i, p = np.eye(5), [np.linalg.matrix_power(np.asarray(q), n) for n in range(6)]
    expected = {
        2: i + 2 * p[1],
        3: i + 2 * p[1] + 2 * p[2] + p[3],
        4: i + 2 * p[1] + 2 * p[2] + p[3],
        5: i + 2 * p[1] + 2 * p[2] + 2 * p[3] + p[4],
        6: i + 2 * p[1] + 2 * p[2] + 2 * p[3] + 2 * p[4] + p[5],
    }
    for terms, by_hand in expected.items():
        np.testing.assert_allclose(cayley_neumann(q, terms), by_hand, atol=1e-6)
    np.testing.assert_allclose(cayley_neumann(q, 30), cayley(-q), atol=1e-6)


def test_the_input_is_rotated_block_by_block():
    kernel, x, entries = r(12, 8), r(5, 12), 0.3 * r(3, 6)
    adapter = flora.OFT(block_size=4, neumann_terms=0)
    plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
    bound = flora.bind({"kernel": kernel}, {"kernel": {"skew": entries}}, plan)
    rotation = np.zeros((12, 12))
    for n, block in enumerate(cayley(skew(entries, 4))):
        rotation[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = block
    np.testing.assert_allclose(ops.dot(x, bound["kernel"]), x @ rotation @ kernel, atol=1e-5)
    merged = flora.materialize(bound)["kernel"]
    angles = lambda w: np.asarray(w).T @ np.asarray(w)
    np.testing.assert_allclose(angles(merged), angles(kernel), atol=1e-4)


def test_a_shared_block_is_one_block_everywhere():
    kernel, entries = r(12, 8), 0.3 * r(1, 6)
    shared = flora.OFT(block_size=4, block_share=True)
    merged = {}
    for adapter, arrays in ((shared, entries), (flora.OFT(blocks=3), jnp.tile(entries, (3, 1)))):
        plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
        bound = flora.bind({"kernel": kernel}, {"kernel": {"skew": arrays}}, plan)
        merged[adapter] = flora.materialize(bound)["kernel"]
    one, two = merged.values()
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_patches_are_rotated_in_torch_order():
    """On the kernel flattened as (out, in, kh, kw); groups have rotations of their own."""
    kernel, entries = r(3, 3, 4, 8), 0.3 * r(4, 36)
    adapter = flora.OFT(block_size=9, neumann_terms=0)
    plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
    bound = flora.bind({"kernel": kernel}, {"kernel": {"skew": entries}}, plan)
    rotation = jax.scipy.linalg.block_diag(*cayley(skew(entries, 9)))
    flat = kernel.transpose(2, 0, 1, 3).reshape(36, 8)
    expected = (rotation @ flat).reshape(4, 3, 3, 8).transpose(1, 2, 0, 3)
    np.testing.assert_allclose(flora.materialize(bound)["kernel"], expected, atol=1e-5)
    x = r(2, 6, 6, 4)
    y = ops.conv(x, bound["kernel"], strides=2)
    np.testing.assert_allclose(y, ops.conv(x, expected, strides=2), atol=1e-4)
    grouped = flora.plan(
        {"kernel": kernel}, {"kernel": adapter}, specs={"kernel": KernelSpec.conv(groups=2)}
    )
    assert grouped.count == 2 * 4 * 36


def test_coft_scales_back_to_the_ball():
    """||Q||_F <= eps / sqrt(blocks); the gradient is the one at the projected point."""
    adapter = flora.OFT(block_size=4, coft=True, eps=0.5)
    entries = jnp.concatenate([0.01 * r(1, 6), r(2, 6)])
    projected = adapter.project(entries)
    norms = jnp.linalg.norm(skew(projected, 4), axis=(1, 2))
    limit = 0.5 / np.sqrt(3)
    np.testing.assert_array_equal(projected[0], entries[0])
    np.testing.assert_allclose(norms[1:], limit, rtol=1e-5)
    np.testing.assert_allclose(adapter.project(projected), projected, rtol=1e-6)
    kernel, x = r(12, 8), r(5, 12)
    plain = dataclasses.replace(adapter, coft=False)

    def loss(adapter):
        plan = flora.plan({"kernel": kernel}, {"kernel": adapter})

        def f(entries):
            bound = flora.bind({"kernel": kernel}, {"kernel": {"skew": entries}}, plan)
            return jnp.square(ops.dot(x, bound["kernel"])).sum()

        return jax.value_and_grad(f)

    for a, b in zip(loss(adapter)(entries), loss(plain)(projected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.isfinite(loss(adapter)(jnp.zeros((3, 6)))[1]).all()


def test_dropout_makes_a_fixed_share_of_blocks_the_identity():
    adapter = flora.OFT(block_size=4, dropout=0.4)
    rotations = adapter.rotations(r(5, 6), 5, 4)
    seen = set()
    for seed in range(8):
        dropped = adapter._dropped(rotations, jax.random.key(seed))
        identity = [np.array_equal(block, np.eye(4)) for block in dropped]
        kept = [np.array_equal(a, b) for a, b in zip(dropped, rotations)]
        assert sum(identity) == int(0.4 * 5) and all(i != k for i, k in zip(identity, kept))
        seen.add(tuple(identity))
    assert len(seen) > 2
    shared = dataclasses.replace(adapter, block_share=True)
    assert shared._dropped(rotations, jax.random.key(0)) is rotations


def test_counts_of_the_benchmark():
    """HF PEFT's table: Llama-3.2-3B, q and v (both of 3072 inputs), 28 layers, 32 blocks of 96."""
    for adapter in (flora.OFT(blocks=32), flora.OFT(block_size=96)):
        assert flora.plan(LLAMA, {".*/kernel": adapter}).count == 8_171_520


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.OFT(block_size=4, blocks=3), "block_size=4 and blocks=3: give one"),
        (flora.OFT(), "kernel: block_size=32 does not divide in=12; nearest: 12"),
        (flora.OFT(block_size=5), "block_size=5 does not divide in=12; nearest: 4 or 6"),
        (flora.OFT(blocks=8), "blocks=8 does not divide in=12; nearest: 6 or 12"),
        (flora.OFT(blocks=12), "a block of size 1"),
        (flora.OFT(block_size=4, neumann_terms=1), "neumann_terms=1"),
        (flora.OFT(block_size=4, coft=True, eps=0.0), "eps=0.0"),
        (flora.OFT(block_size=4, dropout=1.0), "dropout=1.0"),
    ],
)
def test_messages(adapter, message):
    with pytest.raises(PlanError, match=message):
        flora.plan({"kernel": r(12, 8)}, {"kernel": adapter})
