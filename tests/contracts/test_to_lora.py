"""Every weight adapter as a LoRA: lossless at full rank, exact where the maps tell their rank."""

import harness
import jax
import numpy as np
import pytest
from harness import LAYERS, PAIRS, case

import flora_jax as flora
from flora_jax.core.errors import PlanError

# Rank of the exact factors on a 12x8 kernel; every other case needs an SVD of its change.
EXACT = {
    "LoRA": 4,
    "LoRA-rs-gaussian": 4,
    "PiSSA": 6,
    "OLoRA": 6,
    "FLoRA": 2,
    "NOLA": 2,
    "Hydra": 5,
    "Hydra-parallel": 2,
    "Hydra-sequential": 3,
    "VeRA": 5,
    "VeRA-stored": 5,
    "KORE": 3,
    "KORE-both": 6,
    "VLoRA": 2,
}
KINDS = ("dense", "einsum-in", "experts", "conv", "conv-groups", "embedding")


ROW = harness.features(range(1))  # per-example methods are converted for one row


def moved(name, kind):
    one = case(name, kind)
    return one.params, one.plan, one.moved


def merged_both(params, plan, adapters, converted, arrays):
    """The weights of a method and of the LoRA made of it."""

    @jax.jit
    def merge(params, adapters, arrays):
        bound = flora.bind(params, adapters, plan, example=ROW)
        return flora.materialize(bound), flora.materialize(flora.bind(params, arrays, converted))

    return jax.device_get(merge(params, adapters, arrays))


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[1] in KINDS[:1] + KINDS[3:4]])
def test_full_rank_is_lossless(name, kind):
    params, plan, adapters = moved(name, kind)
    if not harness.merges(name):
        with pytest.raises(PlanError, match=LAYERS[kind].name):
            flora.to_lora(params, adapters, plan, rank=8)
        return
    converted, arrays, report = flora.to_lora(params, adapters, plan, rank=8, example=ROW)
    expected, found = merged_both(params, plan, adapters, converted, arrays)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(leaf, wanted, atol=3e-5 * max(1.0, np.abs(wanted).max()))
    (row,) = (row for row in report if row.form == "lora")
    assert row.error < 1e-5 and row.rank <= 8


@pytest.mark.parametrize("name", EXACT)
def test_exact_without_a_limit(name):
    params, plan, adapters = moved(name, "dense")
    converted, arrays, report = flora.to_lora(params, adapters, plan, example=ROW)
    assert [(row.rank, row.exact) for row in report] == [(EXACT[name], True)]
    assert converted.count == EXACT[name] * 20 + (8 if "bias" in arrays["kernel"] else 0)
    expected, found = merged_both(params, plan, adapters, converted, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["LoRA", "FLoRA"])
def test_exact_on_every_kind_of_kernel(name, kind):
    params, plan, adapters = moved(name, kind)
    converted, arrays, report = flora.to_lora(params, adapters, plan)
    assert report[LAYERS[kind].name].exact
    layer = LAYERS[kind]

    @jax.jit
    def outputs(params, adapters, arrays, x):
        trees = flora.bind(params, adapters, plan), flora.bind(params, arrays, converted)
        return [harness.run(layer, tree, x) for tree in trees]

    expected, found = jax.device_get(outputs(params, adapters, arrays, layer.x()))
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["DoRA", "IA3", "Replace"])
def test_a_change_of_full_rank_asks_for_a_limit(name):
    params, plan, adapters = moved(name, "dense")
    with pytest.raises(PlanError, match=r"kernel: .*give rank="):
        flora.to_lora(params, adapters, plan)


@pytest.mark.parametrize("name", ["DoRA", "Hydra"])
def test_the_cut_is_the_best_of_its_rank(name):
    """Eckart-Young: the reported error is that of the singular values left out."""
    params, plan, adapters = moved(name, "dense")
    change = flora.materialize(flora.bind(params, adapters, plan))["kernel"] - params["kernel"]
    s = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    converted, arrays, report = flora.to_lora(params, adapters, plan, rank=2)
    np.testing.assert_allclose(
        report["kernel"].error, np.sqrt((s[2:] ** 2).sum() / (s**2).sum()), rtol=1e-3
    )
    kept = flora.materialize(flora.bind(params, arrays, converted))["kernel"] - params["kernel"]
    np.testing.assert_allclose(
        np.linalg.norm(change - kept), np.sqrt((s[2:] ** 2).sum()), rtol=1e-3
    )
    for energy in (0.5, 0.9, 0.999):
        rank = int(np.argmax(np.cumsum(s**2) >= energy * (s**2).sum())) + 1
        _, _, report = flora.to_lora(params, adapters, plan, energy=energy)
        assert report["kernel"].rank == rank and report["kernel"].energy >= energy - 1e-6
        _, _, report = flora.to_lora(params, adapters, plan, error=float(np.sqrt(1 - energy)))
        assert report["kernel"].rank == rank
