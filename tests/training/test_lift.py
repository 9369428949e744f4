"""LIFT against its paper's closed forms: masks, carried moments, masked dense AdamW, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as flora
from flora_jax import training
from flora_jax.core.errors import ConfigError, PlanError
from flora_jax.training import LIFT, optim

SMALL = {"rank": 1, "filter_rank": 2, "refresh": 1000, "learning_rate": 0.1}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(params, seed):
    return jax.tree.map(lambda p: normal(seed, *p.shape), params)


def run(optimizer, params, steps, gradient=None):
    """Parameters, state and the masks (flat indices) after each of ``steps`` updates."""
    tx = optim.build(optimizer, params)
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for t in range(steps):
        grads = drawn(params, 100 + t) if gradient is None else gradient(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def inner(state):
    return state.inner_state


def top(score, k):
    """Indices of the k largest, ties to the lower index: the definition, on the host."""
    order = sorted(range(score.size), key=lambda i: (-score.reshape(-1)[i], i))
    return sorted(order[:k])


def reconstructed(w, rank):
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_the_mask_has_exactly_k_entries_the_largest_of_the_approximation():
    w = normal(0, 12, 8)
    for select, sign in (("largest", 1), ("smallest", -1)):
        lift = LIFT(**{**SMALL, "select": select})
        _, state = run(lift, {"kernel": w}, 1)[0]
        index = inner(state).index["kernel"]
        assert index.dtype == jnp.int32 and len(set(index.tolist())) == (12 + 8) * 1
        assert index.tolist() == top(sign * np.abs(reconstructed(w, 2)), 20)
        assert inner(state).mu["kernel"].shape == inner(state).nu["kernel"].shape == (20,)
        assert lift.moves({"kernel": w}) == {"kernel": 20}


def test_full_filter_rank_is_magnitude():
    w = normal(1, 12, 8)
    lowrank = run(LIFT(**{**SMALL, "filter_rank": 8}), {"kernel": w}, 1)[0][1]
    magnitude = run(LIFT(**{**SMALL, "score": "magnitude"}), {"kernel": w}, 1)[0][1]
    assert inner(lowrank).index["kernel"].tolist() == inner(magnitude).index["kernel"].tolist()
    assert inner(magnitude).index["kernel"].tolist() == top(np.abs(np.asarray(w)), 20)
    narrow = run(LIFT(**SMALL), {"kernel": w}, 1)[0][1]
    assert inner(narrow).index["kernel"].tolist() != inner(magnitude).index["kernel"].tolist()


def test_ties_go_to_the_lower_index():
    w = jnp.ones((4, 4))
    lift = LIFT(**{**SMALL, "score": "magnitude"})
    for select in ("largest", "smallest"):
        (_, state), *_ = run(LIFT(**{**SMALL, "score": "magnitude", "select": select}), {"w": w}, 1)
        assert inner(state).index["w"].tolist() == list(range(8))
    assert lift.moves({"w": w}) == {"w": 8}


@functools.cache
def refreshed(refresh=4, steps=11):
    """A run with several new masks; the gradient pulls entries across the ranking."""
    target = normal(7, 12, 8) * 3
    gradient = lambda p: jax.tree.map(lambda w: w - target, p)
    lift = LIFT(**{**SMALL, "refresh": refresh, "learning_rate": 0.5})
    start = {"kernel": normal(2, 12, 8).at[0, 0].set(-0.0)}
    return start, gradient, run(lift, start, steps, gradient)


def bits(x):
    return np.asarray(x).reshape(-1).view(np.uint32)


def test_entries_outside_the_mask_keep_their_bits():
    start, _, seen = refreshed()
    before, masks = start["kernel"], []
    for params, state in seen:
        mask = inner(state).index["kernel"].tolist()
        outside = np.setdiff1d(np.arange(96), mask)
        np.testing.assert_array_equal(bits(params["kernel"])[outside], bits(before)[outside])
        assert (bits(params["kernel"])[mask] != bits(before)[mask]).all()
        before = params["kernel"]
        masks.append(mask)
    dropped = set(masks[2]) - set(masks[3])  # once trained, now frozen: the value stays
    assert dropped
    never = np.setdiff1d(np.arange(96), sum(masks, []))
    assert len(never)
    np.testing.assert_array_equal(bits(before)[never], bits(start["kernel"])[never])


def test_cadence_is_that_of_the_released_code():
    """A new mask at the first step, then at steps 4, 8 ...: after t steps with (t + 1) % 4 == 0."""
    start, _, seen = refreshed()
    masks = [inner(state).index["kernel"].tolist() for _, state in seen]
    changed = [t + 1 for t in range(1, len(masks)) if masks[t] != masks[t - 1]]
    assert changed == [4, 8]
    weights = [start, *(params for params, _ in seen)]
    for step in (1, 4, 8):  # of the weights as the step finds them
        score = np.abs(reconstructed(weights[step - 1]["kernel"], 2))
        assert masks[step - 1] == top(score, 20)


def test_moments_over_a_refresh_equal_a_dense_simulation():
    start, gradient, seen = refreshed()
    w = np.asarray(start["kernel"], np.float64).reshape(-1)
    m, v = np.zeros(96), np.zeros(96)
    for t, (params, state) in enumerate(seen, 1):
        mask = np.zeros(96, bool)
        mask[np.asarray(inner(state).index["kernel"])] = True
        m, v = np.where(mask, m, 0), np.where(mask, v, 0)  # dropped moments are forgotten
        g = np.asarray(gradient({"kernel": jnp.asarray(w.reshape(12, 8), jnp.float32)})["kernel"])
        g = np.where(mask, g.reshape(-1), 0)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        step = 0.5 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        w = np.where(mask, w - step, w)
        np.testing.assert_allclose(params["kernel"].reshape(-1), w, rtol=2e-4, atol=2e-5)
    index = np.asarray(inner(state).index["kernel"])
    np.testing.assert_allclose(inner(state).mu["kernel"], m[index], rtol=1e-3, atol=1e-5)
    assert int(inner(state).count) == len(seen)


def test_a_fixed_mask_is_masked_dense_adamw():
    params, decay = {"kernel": normal(3, 12, 8)}, 0.3
    seen = run(LIFT(**{**SMALL, "weight_decay": decay}), params, 5)
    mask = np.zeros(96, np.float32)
    mask[np.asarray(inner(seen[-1][1]).index["kernel"])] = 1
    mask = jnp.asarray(mask.reshape(12, 8))
    only = lambda tree: jax.tree.map(lambda x: x * mask, tree)
    tx = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-6, weight_decay=decay)
    state, w = tx.init(params), params
    for t in range(5):
        updates, state = tx.update(only({"kernel": normal(100 + t, 12, 8)}), state, w)
        w = optax.apply_updates(w, only(updates))
    np.testing.assert_allclose(seen[-1][0]["kernel"], w["kernel"], rtol=1e-5, atol=1e-6)


def test_k_of_all_entries_is_adamw():
    params = {"kernel": normal(4, 6, 5)}
    ours = run(LIFT(**{**SMALL, "rank": 9, "refresh": 2, "weight_decay": 0.1}), params, 5)[-1][0]
    theirs = run(
        training.AdamW(learning_rate=0.1, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1), params, 5
    )[-1][0]
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-5, atol=1e-6)
    assert LIFT(rank=9, filter_rank=2).moves(params) == {"kernel": 30}


@pytest.mark.parametrize("score", ["gradient", "random"])
def test_other_scores(score):
    params = {"kernel": normal(5, 12, 8)}
    lift = LIFT(**{**SMALL, "score": score, "refresh": 2})
    seen = run(lift, params, 2)
    masks = [inner(state).index["kernel"].tolist() for _, state in seen]
    assert [len(set(m)) for m in masks] == [20, 20] and masks[0] != masks[1]
    if score == "gradient":
        assert masks == [top(np.abs(np.asarray(normal(100 + t, 12, 8))), 20) for t in range(2)]
    again = run(lift, params, 2)
    assert [inner(state).index["kernel"].tolist() for _, state in again] == masks


def test_randomized_svd_finds_the_same_mask_of_a_decaying_spectrum():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 24)))[0] for n in (40, 32))
    w = jnp.asarray((u * 2.0 ** -np.arange(24)) @ v.T, jnp.float32)
    options = {**SMALL, "filter_rank": 4}
    masks = [
        set(inner(run(LIFT(**options, svd=svd), {"w": w}, 1)[0][1]).index["w"].tolist())
        for svd in ("exact", "randomized")
    ]
    assert len(masks[0] & masks[1]) >= 70 and len(masks[0]) == 72


def test_stacks_experts_and_convolutions_are_masked_matrix_by_matrix():
    stack = normal(6, 3, 12, 8)
    lift = LIFT(**SMALL)
    state = run(lift, {"layers": {"q": {"kernel": stack}}}, 1)[0][1]
    rows = inner(state).index["layers"]["q"]["kernel"]
    assert rows.shape == (3, 20)
    for row, w in zip(rows, stack, strict=True):
        assert row.tolist() == top(np.abs(reconstructed(w, 2)), 20)

    conv = normal(8, 3, 3, 2, 6)  # [window, in, out] is the matrix 18 x 6
    state = run(lift, {"conv": {"kernel": conv}}, 1)[0][1]
    expected = top(np.abs(reconstructed(np.asarray(conv).reshape(18, 6), 2)), 24)
    assert inner(state).index["conv"]["kernel"].tolist() == expected

    specs = {"experts/kernel": flora.KernelSpec.einsum("EBD,DEF->EBF")}
    experts = normal(9, 12, 4, 8)  # stored [in, expert, out]
    lift = LIFT(**SMALL, specs=specs)
    state = run(lift, {"experts": {"kernel": experts}}, 1)[0][1]
    mask = np.zeros(12 * 4 * 8, bool)
    mask[np.asarray(inner(state).index["experts"]["kernel"])] = True
    mask = mask.reshape(12, 4, 8)
    assert mask.sum((0, 2)).tolist() == [20] * 4
    for e in range(4):
        expected = top(np.abs(reconstructed(experts[:, e], 2)), 20)
        assert np.flatnonzero(mask[:, e]).tolist() == expected
    assert lift.moves({"experts": {"kernel": experts}}) == {"experts/kernel": 80}


def test_counts_of_the_paper():
    q_proj = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    assert LIFT(rank=128).moves({"q": {"kernel": q_proj}}) == {"q/kernel": 1_048_576}
    stacked = jax.ShapeDtypeStruct((32, 4096, 4096), jnp.bfloat16)
    assert LIFT(rank=128).moves({"layers": {"q": {"kernel": stacked}}}) == {
        "layers/q/kernel": 32 * 1_048_576
    }


@pytest.mark.parametrize(
    "options,tree,message",
    [
        ({}, {"norm": {"scale": normal(0, 8)}}, r"norm/scale: LIFT masks matrices.*\(8,\)"),
        ({}, {"layers": {"norm": {"scale": normal(0, 4, 8)}}}, "layers/norm/scale: LIFT masks"),
        ({}, {"q": {"kernel": normal(0, 2, 4, 8)}}, "q/kernel: cannot tell what a kernel"),
        ({"filter_rank": 9}, {"q": {"kernel": normal(0, 12, 8)}}, "q/kernel: LIFT.filter_rank=9 "),
    ],
)
def test_refuses_what_it_cannot_mask(options, tree, message):
    with pytest.raises(PlanError, match=message):
        optim.build(LIFT(**{**SMALL, **options}), tree).init(tree)


def test_refuses_wrong_options():
    for options, message in (
        ({"select": "biggest"}, "LIFT.select='biggest' is not one of largest, smallest"),
        ({"score": "hessian"}, "LIFT.score='hessian'"),
        ({"svd": "fast"}, "LIFT.svd='fast'"),
        ({"refresh": 0}, "LIFT.refresh=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LIFT(**options)
    with pytest.raises(ConfigError, match="needs params"):
        tree = {"kernel": normal(0, 12, 8)}
        tx = LIFT(**SMALL).transform(0.1, None)
        tx.update(tree, tx.init(tree))


def test_rank_reduction_finds_the_signal_under_noise():
    """The paper's claim in closed form, on ``W = L + noise`` with L of rank 2 and noise as large.

    If a task asks for more of the signal (a change ``c L``), the least squared error of training
    only the entries of a mask is what L has outside it: rank reduction leaves less than magnitude.
    """
    signal = normal(40, 64, 2) @ normal(41, 2, 64)
    noise = normal(42, 64, 64) * jnp.sqrt(jnp.mean(signal**2))
    square = np.square(np.asarray(signal)).reshape(-1)
    best, found, left = set(top(square, 256)), {}, {}
    for score in ("lowrank", "magnitude", "random"):
        lift = LIFT(rank=2, filter_rank=2, refresh=1000, learning_rate=0.1, score=score)
        _, state = run(lift, {"kernel": signal + noise}, 1)[0]
        index = inner(state).index["kernel"].tolist()
        found[score] = len(best & set(index)) / 256
        left[score] = 1 - square[index].sum() / square.sum()
    assert found["lowrank"] > 0.7 > 0.6 > found["magnitude"] > 2 * found["random"]
    assert left["lowrank"] < left["magnitude"] - 0.05 < left["random"] - 0.2
