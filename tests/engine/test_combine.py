"""Adapters of any two methods merged into one, on their exact changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine_convert import r, same, stacked_params, trained

import flora_jax as flora
from flora_jax import merging
from flora_jax.core.errors import ConfigError, PlanError
from flora_jax.core.paths import flatten

Q, UP = "layers/q_proj/kernel", "layers/up/kernel"


@pytest.fixture(scope="module")
def three():
    params = stacked_params()
    plans, trees = {}, {}
    rules = {
        "lora": {".*/kernel": flora.LoRA(rank=2), "layers/norm/scale": flora.Replace()},
        "ia3": {Q: flora.IA3(), "embed/embedding": flora.LoRA(rank=1)},
        "dora": {UP: flora.DoRA(rank=2), "layers/q_proj/bias": flora.Replace()},
    }
    for seed, (name, own) in enumerate(rules.items()):
        plans[name], trees[name] = trained(params, own, seed)
    return params, trees, plans


def changes(params, trees, plans):
    """{name: {path: W - W0}} of everything that differs, from the dense merges."""
    out = {}
    for name in trees:
        merged = flatten(flora.materialize(flora.bind(params, trees[name], plans[name])))
        before = flatten(params)
        out[name] = {p: merged[p] - before[p] for p in merged if np.any(merged[p] != before[p])}
    return out


def applied(params, combined, **kw):
    plan, arrays, _ = combined
    merged = flatten(flora.materialize(flora.bind(params, arrays, plan)))
    return {p: merged[p] - leaf for p, leaf in flatten(params).items()}


WEIGHTS = {"lora": 0.5, "ia3": 2.0, "dora": -1.0}


@pytest.mark.parametrize("as_", ["lora", "replace"])
def test_linear_is_the_weighted_sum(three, as_):
    params, trees, plans = three
    limit = {"rank": 8} if as_ == "lora" else {}
    combined = flora.combine_adapters(params, trees, plans, weights=WEIGHTS, as_=as_, **limit)
    found, parts = applied(params, combined), changes(*three)
    for path, change in found.items():
        expected = sum(WEIGHTS[n] * part[path] for n, part in parts.items() if path in part)
        np.testing.assert_allclose(change, expected, atol=2e-4, err_msg=path)
    bound = flora.bind(params, trees, plans, weights=WEIGHTS)
    same(
        flora.materialize(flora.bind(params, combined[1], combined[0])),
        flora.materialize(bound),
        2e-4,
    )


def test_cat_is_exact_and_refuses_what_is_not_low_rank(three):
    params, trees, plans = three
    pick = lambda *names: ({n: trees[n] for n in names}, {n: plans[n] for n in names})
    other = trained(params, {Q: flora.VeRA(rank=3)}, 5)
    two = ({"lora": trees["lora"], "vera": other[1]}, {"lora": plans["lora"], "vera": other[0]})
    combined = flora.combine_adapters(params, *two, weights=[1.0, -0.5], method="cat")
    assert {row.path: row.rank for row in combined[2]}[Q] == 5 and combined[2].error == 0
    bound = flora.bind(params, *two, weights=[1.0, -0.5])
    same(flora.materialize(flora.bind(params, combined[1], combined[0])), flora.materialize(bound))
    with pytest.raises(PlanError, match=f"{Q}: 'cat' needs low-rank factors"):
        flora.combine_adapters(params, *pick("lora", "ia3"), method="cat")


def test_svd_is_the_best_of_its_rank(three):
    params, trees, plans = three
    combined = flora.combine_adapters(params, trees, plans, method="svd", rank=2)
    parts = changes(*three)
    found = applied(params, combined)
    for path in (Q, UP):
        total = sum(part[path] for part in parts.values() if path in part)
        u, s, vt = np.linalg.svd(np.asarray(total, np.float64), full_matrices=False)
        best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        np.testing.assert_allclose(found[path], best, atol=2e-3)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
def test_sparse_methods_work_on_the_changes(three, method):
    params, trees, plans = three
    key = jax.random.key(3)
    combined = flora.combine_adapters(
        params, trees, plans, weights=WEIGHTS, method=method, density=0.4, key=key, as_="replace"
    )
    found, parts = applied(params, combined), list(changes(*three).values())
    rule = {"magnitude_prune": merging.magnitude_prune, "ties": merging.ties}.get(method)
    options = {"density": 0.4}
    if rule is None:
        rule = merging.dare
        options |= {"key": key, "election": "total" if method == "dare_ties" else None}
    stacks = {path: 1 for path in found if path.startswith("layers")}
    expected = rule(parts, list(WEIGHTS.values()), stacks=stacks, **options)
    for path, change in found.items():
        np.testing.assert_allclose(change, expected.get(path, 0 * change), atol=2e-4, err_msg=path)
    lora = flora.combine_adapters(
        params, trees, plans, weights=WEIGHTS, method=method, density=0.4, key=key, rank=8
    )
    same(applied(params, lora), found, 3e-4)


def test_scanned_and_unrolled_models_combine_alike():
    """Trimming and dropping go layer by layer, and the drops follow the canonical path."""
    scanned = {"layers": {"kernel": r(3, 8, 6)}}
    unrolled = {f"layers_{n}": {"kernel": scanned["layers"]["kernel"][n]} for n in range(3)}
    plan, one = trained(scanned, {".*": flora.LoRA(rank=2)})
    _, two = trained(scanned, {".*": flora.LoRA(rank=2)}, 1)
    plans = flora.plan(unrolled, {".*": flora.LoRA(rank=2)})
    unroll = lambda tree: {
        f"layers_{n}/kernel": jax.tree.map(lambda a, n=n: a[n], tree["layers/kernel"])
        for n in range(3)
    }
    for method in ("ties", "dare"):
        kw = {"method": method, "density": 0.5, "as_": "replace"}
        _, whole, _ = flora.combine_adapters(scanned, {"a": one, "b": two}, plan, **kw)
        _, parts, _ = flora.combine_adapters(
            unrolled, {"a": unroll(one), "b": unroll(two)}, plans, **kw
        )
        stacked = jnp.stack([parts[f"layers_{n}/kernel"]["value"] for n in range(3)])
        np.testing.assert_allclose(whole["layers/kernel"]["value"], stacked, atol=1e-5)


def test_messages(three):
    params, trees, plans = three
    bad = [
        ({"method": "tie"}, "unknown method 'tie'; nearest: ties"),
        ({"as_": "dense"}, "unknown form 'dense'"),
        ({"method": "svd"}, "'svd' needs rank="),
        ({"method": "ties"}, "take one"),
        ({"density": 0.5}, "take one"),
        ({"method": "cat", "rank": 3}, "'cat' is exact"),
        ({"as_": "replace", "rank": 3}, "do not apply"),
        ({"weights": {"lora": 1.0}}, "weights for"),
        ({"method": "ties", "density": 1.5, "as_": "replace"}, "density=1.5"),
    ]
    for options, message in bad:
        with pytest.raises(ConfigError, match=message):
            flora.combine_adapters(params, trees, plans, **options)
    with pytest.raises(PlanError, match="ties gives no low-rank change"):
        flora.combine_adapters(params, trees, plans, method="ties", density=0.5)
