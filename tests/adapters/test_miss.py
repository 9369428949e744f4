"""MiSS and Bone: the closed forms and counts of the card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.change import delta_factors
from flora_jax.core.errors import PlanError
from flora_jax.core.operators import Base
from flora_jax.core.spec import KernelSpec

R, IN, OUT = 4, 12, 8


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def merged(adapter, kernel, arrays):
    """The dense weight of one adapter with given arrays."""
    plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
    bound = flora.bind({"kernel": kernel}, {"kernel": arrays}, plan)
    return np.asarray(flora.materialize(bound)["kernel"])


def test_the_default_is_a_repeated_block():
    kernel, block = r(IN, OUT), r(R, OUT)
    expected = kernel + jnp.concatenate([block] * (IN // R))
    np.testing.assert_allclose(merged(flora.MiSS(rank=R), kernel, {"block": block}), expected, 1e-6)


def test_a_last_shard_that_is_shorter_takes_the_first_rows():
    kernel, block = r(14, OUT), r(R, OUT)
    expected = kernel + jnp.concatenate([block, block, block, block[:2]])
    np.testing.assert_allclose(merged(flora.MiSS(rank=R), kernel, {"block": block}), expected, 1e-6)


def test_the_first_form_of_the_paper_repeats_over_runs_of_outputs():
    """Eq. 2-3: every output of a run gets the same update; forward = repeat(D x, sizes)."""
    kernel, rows, x = r(IN, 7), r(IN, 3), r(5, IN)
    adapter = flora.MiSS(rank=3, share="out")
    sizes = [3, 2, 2]
    expected = kernel + jnp.repeat(rows, jnp.array(sizes), axis=1)
    np.testing.assert_allclose(merged(adapter, kernel, {"rows": rows}), expected, 1e-6)
    plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
    bound = flora.bind({"kernel": kernel}, {"kernel": {"rows": rows}}, plan)
    by_hand = x @ kernel + jnp.repeat(x @ rows, jnp.array(sizes), axis=1)
    np.testing.assert_allclose(ops.dot(x, bound["kernel"]), by_hand, atol=1e-5)


def test_mini_is_tiled_and_with_all_outputs_the_default():
    kernel, block, small = r(IN, OUT), r(R, OUT), r(R, 2)
    tiled = merged(flora.MiSS(rank=R, mini_r=2), kernel, {"mini": small})
    default = flora.MiSS(rank=R)
    as_block = {"block": jnp.tile(small, (1, OUT // 2))}
    np.testing.assert_allclose(tiled, merged(default, kernel, as_block), 1e-6)
    whole = merged(flora.MiSS(rank=R, mini_r=OUT), kernel, {"mini": block})
    np.testing.assert_array_equal(whole, merged(default, kernel, {"block": block}))


@pytest.mark.parametrize("group", ["row", "col"])
def test_bat_is_the_loop_over_blocks(group):
    """In torch's orientation: W[o, i] = W0[o, i] (I + B_g) + B_g."""
    w0 = np.asarray(r(OUT, IN), np.float64)
    n = (OUT if group == "row" else IN) // R
    blocks = np.asarray(r(n, R, R), np.float64)
    w = w0.copy()
    for o in range(OUT // R):
        for i in range(IN // R):
            at = np.s_[o * R : (o + 1) * R, i * R : (i + 1) * R]
            b = blocks[o if group == "row" else i]
            w[at] = w0[at] @ (np.eye(R) + b) + b
    ours = {"blocks": jnp.asarray(blocks.swapaxes(1, 2), jnp.float32)}
    got = merged(flora.Bone(rank=R, group=group), jnp.asarray(w0.T, jnp.float32), ours)
    np.testing.assert_allclose(got.T, w, atol=1e-5)


def test_row_and_column_counts():
    count = lambda group: flora.plan(
        {"kernel": r(IN, OUT)}, {"kernel": flora.Bone(rank=R, group=group)}
    ).count
    assert (count("row"), count("col")) == (R * OUT, R * IN)


@pytest.mark.parametrize("group", ["row", "col"])
def test_unmerge_restores_the_weight(group):
    """Also a stack of convolutions: canonical blocks, layer by layer."""
    adapter = flora.Bone(rank=R, group=group)
    specs = [KernelSpec.dense(), KernelSpec.conv(2, stack_ndim=1)]
    for spec, kernel in zip(specs, (r(IN, OUT), r(2, 3, 3, 4, 8))):
        plan = flora.plan({"kernel": kernel}, {"kernel": adapter}, specs={"kernel": spec})
        fresh = flora.init(plan, jax.random.key(0), {"kernel": kernel})
        moved = jax.tree.map(lambda a: 0.2 * r(*a.shape, seed=3), fresh)
        new = flora.materialize(flora.bind({"kernel": kernel}, moved, plan))["kernel"]
        assert np.abs(new - kernel).max() > 0.1
        back = adapter.unmerge(new, moved["kernel"], spec)
        np.testing.assert_allclose(back, kernel, atol=1e-5)


def test_unmerge_of_a_singular_block_is_refused():
    blocks = jnp.zeros((2, R, R)).at[1].set(-jnp.eye(R))
    with pytest.raises(PlanError, match="condition number inf"):
        flora.Bone(rank=R).unmerge(r(IN, OUT), {"blocks": blocks}, KernelSpec.dense())
    close = jnp.zeros((2, R, R)).at[1, 0, 0].set(-1 + 2.0**-20)
    with pytest.raises(PlanError, match=r"condition number 1.05e\+06, above 1e\+04"):
        flora.Bone(rank=R).unmerge(r(IN, OUT), {"blocks": close}, KernelSpec.dense())


@pytest.mark.parametrize(
    ("adapter", "rank"),
    [
        (flora.MiSS(rank=R), R),
        (flora.MiSS(rank=5), 5),
        (flora.MiSS(rank=5, mini_r=2), 2),
        (flora.MiSS(rank=3, share="out"), 3),
    ],
    ids=str,
)
def test_exactly_a_lora(adapter, rank):
    """``A = S`` (tiled identities) and ``B = D``, found without forming the change."""
    kernel = r(IN, OUT)
    spec = KernelSpec.dense()
    plan = flora.plan({"kernel": kernel}, {"kernel": adapter})
    fresh = flora.init(plan, jax.random.key(0), {"kernel": kernel})["kernel"]
    arrays = jax.tree.map(lambda a: r(*a.shape, seed=5), fresh)
    base = Base(kernel, spec)
    context = flora.core.adapter.Context(base, kernel.shape)
    a, b = delta_factors(adapter.operator(arrays, spec, context), base)
    assert (a.shape, b.shape) == ((IN, rank), (rank, OUT))
    np.testing.assert_allclose(kernel + a @ b, merged(adapter, kernel, arrays), atol=1e-5)
    if adapter == flora.MiSS(rank=R):
        np.testing.assert_array_equal(a, jnp.tile(jnp.eye(R), (IN // R, 1)))


LLAMA = {
    "layers": {
        "q_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 3072), jnp.bfloat16)},
        "v_proj": {"kernel": jax.ShapeDtypeStruct((28, 3072, 1024), jnp.bfloat16)},
    }
}


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (flora.MiSS(rank=64), 7_340_032),
        (flora.Bone(rank=64), 7_340_032),
        (flora.MiSS(rank=64, mini_r=64), 229_376),
    ],
    ids=str,
)
def test_counts_of_the_benchmark(adapter, count):
    """HF PEFT's table: Llama-3.2-3B, q and v of 28 layers."""
    assert flora.plan(LLAMA, {".*/kernel": adapter}).count == count


def test_no_saddle_at_the_start():
    """dL/dD = (sum of shards)^T dL/dy at step 0, where LoRA's a has no gradient."""
    kernel, x = r(IN, OUT), r(5, IN)
    plan = flora.plan({"kernel": kernel}, {"kernel": flora.MiSS(rank=R)})
    adapters = flora.init(plan, jax.random.key(0), {"kernel": kernel})
    loss = lambda a: ops.dot(x, flora.bind({"kernel": kernel}, a, plan)["kernel"]).sum()
    found = jax.grad(loss)(adapters)["kernel"]["block"]
    shards = x.reshape(5, IN // R, R).sum(1)
    np.testing.assert_allclose(found, shards.T @ jnp.ones((5, OUT)), atol=1e-5)
    assert np.abs(found).max() > 0.1


def test_a_lookup_takes_the_row_of_its_shard():
    table, block = r(IN, OUT), r(5, OUT)
    plan = flora.plan({"embedding": table}, {"embedding": flora.MiSS(rank=5)})
    bound = flora.bind({"embedding": table}, {"embedding": {"block": block}}, plan)
    ids = jnp.array([0, 7, 11])
    np.testing.assert_allclose(
        ops.embed(ids, bound["embedding"]), table[ids] + block[ids % 5], atol=1e-6
    )


def test_kaiming_start_is_not_the_identity():
    kernel = r(IN, OUT)
    plan = flora.plan({"kernel": kernel}, {"kernel": flora.MiSS(rank=R, initializer="kaiming")})
    block = flora.init(plan, jax.random.key(0), {"kernel": kernel})["kernel"]["block"]
    assert 0 < np.abs(block).max() <= OUT**-0.5


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (flora.MiSS(rank=0), r"kernel: rank=0 is outside 1..12, the input size"),
        (flora.MiSS(rank=13), "rank=13 is outside 1..12"),
        (flora.MiSS(rank=9, share="out"), "rank=9 is outside 1..8, the output size"),
        (flora.MiSS(rank=2, share="both"), "share='both'"),
        (flora.MiSS(rank=2, mini_r=3), "mini_r=3 does not divide out=8; nearest: 2 or 4"),
        (flora.MiSS(rank=2, mini_r=2, share="out"), "mini_r repeats"),
        (flora.MiSS(rank=2, initializer="normal"), "initializer='normal'"),
        (flora.MiSS(rank=2, dropout=1.0), "dropout=1.0"),
        (flora.Bone(rank=5), "rank=5 does not divide in=12; nearest: 4 or 6"),
        (flora.Bone(rank=6), "rank=6 does not divide out=8; nearest: 4 or 8"),
        (flora.Bone(rank=4, group="both"), "group='both'"),
    ],
)
def test_messages(adapter, message):
    with pytest.raises(PlanError, match=message):
        flora.plan({"kernel": r(IN, OUT)}, {"kernel": adapter})
