"""Elementary merges by hand, and against HF PEFT's merge_utils on the same tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import merging
from flora_jax.core.errors import ConfigError
from flora_jax.merging.sparse import disjoint_mean, drop, elect_sign, trim


def r(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


def test_trim_keeps_an_exact_number():
    x = jnp.array([[3.0, -3.0], [3.0, 1.0]])
    assert trim(x, 0.5).tolist() == [[3.0, -3.0], [0.0, 0.0]], "ties at the cut: the earlier stay"
    assert (trim(r(7, 9), 0.3) != 0).sum() == int(0.3 * 63)
    assert (trim(x, 0.0) == 0).all() and (trim(x, 1.0) == x).all()


def test_ties_by_hand():
    """Signs +,+,-; masses 1+1 < 3: '-' wins by mass, '+' by frequency."""
    x = jnp.array([[1.0], [1.0], [-3.0]])
    assert elect_sign(x).tolist() == [-1.0] and elect_sign(x, "frequency").tolist() == [1.0]
    weights = jnp.array([1.0, 0.5, 2.0])
    assert disjoint_mean(x, jnp.array([-1.0]), weights).tolist() == [-6.0]
    assert disjoint_mean(x, jnp.array([1.0]), weights).tolist() == [0.75]
    assert disjoint_mean(0 * x, jnp.array([1.0]), weights).tolist() == [0.0]


def test_dare_is_unbiased():
    x = r(5)
    keys = jax.random.split(jax.random.key(0), 20000)
    mean = jax.vmap(lambda k: drop(k, x, 0.3))(keys).mean(0)
    np.testing.assert_allclose(mean, x, atol=0.06)
    kept = np.asarray(drop(keys[0], jnp.ones(1000), 0.25))
    assert set(np.unique(kept)) == {0.0, 4.0}


def test_a_task_without_a_leaf_has_no_say():
    tasks = [{"a": r(4, 4), "b": r(3)}, {"a": r(4, 4, seed=1)}]
    out = merging.ties(tasks, [1.0, 1.0], density=1.0)
    np.testing.assert_allclose(out["b"], tasks[0]["b"], rtol=1e-6)
    np.testing.assert_allclose(merging.linear(tasks, [2.0, 1.0])["b"], 2 * tasks[0]["b"], rtol=1e-6)


def test_dtype_comes_back_and_bad_values_say_so():
    tasks = [{"a": r(4, 4).astype(jnp.bfloat16)}] * 2
    assert merging.magnitude_prune(tasks, density=0.5)["a"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match=r"density=0.0 of a random drop"):
        merging.dare(tasks, density=0.0)
    with pytest.raises(ConfigError, match="1 weights for 2 tasks"):
        merging.ties(tasks, [1.0], density=0.5)
    with pytest.raises(ConfigError, match="nearest: total"):
        merging.ties(tasks, density=0.5, election="totl")


@pytest.mark.interop
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_same_as_peft(density):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils")
    ours = [{"w": r(9, 11, seed=s)} for s in (0, 10, 20)]
    tensors = [torch.tensor(np.asarray(task["w"])) for task in ours]
    weights = [0.7, -1.3, 2.0]
    w = torch.tensor(weights)
    same = lambda a, b: np.testing.assert_allclose(a["w"], b.numpy(), atol=1e-5)
    same(merging.linear(ours, weights), theirs.task_arithmetic(tensors, w))
    pruned = theirs.magnitude_prune(tensors, w, density)
    same(merging.magnitude_prune(ours, weights, density=density), pruned)
    for election in ("total", "frequency"):
        merged = theirs.ties(tensors, w, density, election)
        same(merging.ties(ours, weights, density=density, election=election), merged)
    # The drops are random: give PEFT ours, and take the rest of its path.
    key = jax.random.key(1)
    one = lambda n: merging.dare([{}] * n + [ours[n]], density=density, key=key)["w"]
    dropped = torch.stack([torch.tensor(np.asarray(one(n))) for n in range(3)])
    same(
        merging.dare(ours, weights, density=density, key=key),
        theirs.task_arithmetic(list(dropped), w),
    )
    mask = theirs.calculate_majority_sign_mask(dropped, "total")
    weighted = dropped * theirs.reshape_weight_task_tensors(dropped, w)
    merged = merging.dare(ours, weights, density=density, key=key, election="total")
    same(merged, theirs.disjoint_merge(weighted, mask))
