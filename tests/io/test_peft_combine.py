"""Combining LoRAs against PEFT's add_weighted_adapter on the same model."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(0).integers(0, 40, (2, 7))
WEIGHTS = [0.7, 1.4]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def pair(tiny_llama, tmp_path_factory):
    """A PEFT model with two random LoRAs; our base, plans and trees of the same."""
    folder = tmp_path_factory.mktemp("combine")
    one = tiny_llama()
    torch.manual_seed(1)
    made = [peft.LoraConfig(r=r, lora_alpha=a, target_modules=TARGETS) for r, a in ((2, 3), (3, 7))]
    wrapped = peft.get_peft_model(copy.deepcopy(one.hf), made[0], adapter_name="x")
    wrapped.add_adapter("y", made[1])
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    wrapped.save_pretrained(folder)
    model, params = one.model, one.params
    loaded = {name: io.load_peft(folder / name, params, model) for name in ("x", "y")}
    plans = {name: plan for name, (plan, _) in loaded.items()}
    trees = {name: tree for name, (_, tree) in loaded.items()}
    apply = jax.jit(lambda tree: model.apply({"params": tree}, jnp.asarray(IDS))[0])
    return wrapped.eval(), params, plans, trees, lambda tree: np.asarray(apply(tree))


def theirs(wrapped, name, **options):
    wrapped.add_weighted_adapter(["x", "y"], WEIGHTS, name, **options)
    wrapped.set_adapter(name)
    with torch.no_grad():
        return wrapped(torch.tensor(IDS)).logits.numpy()


CASES = {
    "cat": ({"combination_type": "cat"}, {"method": "cat"}),
    "svd": ({"combination_type": "svd", "svd_rank": 2}, {"method": "svd", "rank": 2}),
    "ties": (
        {"combination_type": "ties_svd", "svd_rank": 3, "density": 0.4},
        {"method": "ties", "rank": 3, "density": 0.4},
    ),
    "prune": (
        {"combination_type": "magnitude_prune_svd", "svd_rank": 3, "density": 0.4},
        {"method": "magnitude_prune", "rank": 3, "density": 0.4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_as_peft(pair, name):
    wrapped, params, plans, trees, apply = pair
    options, ours = CASES[name]
    expected = theirs(wrapped, name, **options)
    plan, arrays, _ = flora.combine_adapters(params, trees, plans, weights=WEIGHTS, **ours)
    found = apply(flora.bind(params, arrays, plan))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_their_linear_is_not_the_weighted_sum(pair):
    """It adds the factors (here of one rank), so B_i A_j appear; ours is what cat gives."""
    wrapped, params, plans, trees, apply = pair
    plan, arrays, _ = flora.combine_adapters(params, trees, plans, weights=WEIGHTS)
    exact = apply(flora.bind(params, arrays, plan))
    both = apply(flora.bind(params, trees, plans, weights=WEIGHTS))
    np.testing.assert_allclose(exact, both, atol=1e-4 * np.abs(both).max())
    wrapped.add_adapter("z", peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    wrapped.add_weighted_adapter(["x", "z"], [1.0, 1.0], "same", combination_type="linear")
    wrapped.set_adapter("same")
    with torch.no_grad():
        linear = wrapped(torch.tensor(IDS)).logits.numpy()
    alone = apply(flora.bind(params, trees["x"], plans["x"]))
    # z is fresh (B = 0): the weighted sum is x alone, but (B_x + 0)(A_x + A_z) is not.
    assert np.abs(linear - alone).max() > 1e-2
