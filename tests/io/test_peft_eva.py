"""EVA against HF PEFT's own, on one batch of a random tiny Llama, and its files."""

import copy
import json

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

IDS = np.random.default_rng(0).integers(0, 40, (8, 12))
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
RANK = 4


@pytest.fixture(scope="module")
def base(tiny_llama):
    """A transformers Llama, ours of the same weights, and the mask of real tokens."""
    one = tiny_llama()
    mask = np.arange(12) < np.array([12, 9, 12, 7, 12, 12, 5, 12])[:, None]
    return one.hf, one.model, one.params, mask


@pytest.fixture(scope="module")
def theirs(base):
    """PEFT's model after its EVA initialisation, right-padded rows, labels on half the rest."""
    hf, _, _, mask = base
    labels = np.where(mask & (np.arange(12) > 1), IDS, -100)
    batch = {"input_ids": IDS, "attention_mask": mask.astype(int), "labels": labels}
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99),
    )
    model = peft.get_peft_model(copy.deepcopy(hf), config, low_cpu_mem_usage=True)
    # one batch again and again: its components stand still at once
    peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model.eval(), labels != -100


@pytest.fixture(scope="module")
def ours(base, theirs):
    _, model, params, _ = base
    trained = jnp.asarray(theirs[1])
    rules = {f"layers/.*/({'|'.join(TARGETS)})/kernel": flora.EVA(rank=RANK, alpha=6.0)}
    plan = flora.plan(params, rules)
    run = lambda p, ids: model.apply({"params": p}, ids)[0]
    start = flora.eva(run, params, plan, [jnp.asarray(IDS)] * 3, mask=lambda _: trained)
    assert (start.batches, start.converged) == (2, True)
    return start.plan, flora.init(start.plan, jax.random.key(0), params, stats=start.stats)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_ranks_scales_and_components_are_those_of_peft(theirs, ours):
    plan, adapters = ours
    found = {}
    for name, module in theirs[0].named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            _, _, _, _, layer, block, proj = name.split(".")
            found[f"layers/{block}/{proj}/kernel", int(layer)] = module
    total = 0
    for entry in plan:
        ranks = entry.adapter.ranks or (entry.adapter.rank,) * 2
        for layer, rank in enumerate(ranks):
            module = found.pop((entry.path, layer), None)
            assert (module is None) == (rank == 0)
            total += rank
            if module is None:
                continue
            a = module.lora_A["default"].weight.detach().numpy()
            assert a.shape[0] == rank
            assert module.scaling["default"] == pytest.approx(entry.adapter.scale)
            mine = np.asarray(adapters[entry.path]["a"][layer][:, :rank])
            cosine = np.abs(np.sum(mine * a.T, axis=0)) / np.linalg.norm(a, axis=1)
            assert cosine.min() >= 0.99, (entry.path, layer, cosine)
            assert not np.any(adapters[entry.path]["a"][layer][:, rank:])
    assert not found and total == RANK * len(TARGETS) * 2


def test_a_file_of_peft_and_of_ours(base, theirs, ours, tmp_path):
    hf, model, params, _ = base
    apply = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(IDS))[0])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs[0].named_parameters():
            if "lora_B" in name:
                p.add_(0.2 * torch.randn_like(p))
    theirs[0].save_pretrained(tmp_path / "theirs")
    plan, adapters = io.load_peft(tmp_path / "theirs", params, model)
    expected = logits(theirs[0])
    got = apply(flora.bind(params, adapters, plan))
    np.testing.assert_allclose(got, expected, atol=1e-4)

    plan, adapters = ours
    noise = np.random.default_rng(3)
    moved = {
        path: {
            n: v + jnp.asarray(0.1 * noise.standard_normal(v.shape), v.dtype)
            for n, v in own.items()
        }
        for path, own in adapters.items()
    }
    for entry in plan:  # as training leaves it: zero beyond a layer's rank
        live = np.arange(entry.adapter.rank) < np.array(entry.adapter.ranks or (99, 99))[:, None]
        own = moved[entry.path]
        moved[entry.path] = {"a": own["a"] * live[:, None], "b": own["b"] * live[..., None]}
    io.save_peft(tmp_path / "ours", moved, plan, params, model)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours").eval()
    expected = apply(flora.bind(params, moved, plan))
    assert np.abs(expected - logits(hf)).max() > 0.01
    np.testing.assert_allclose(logits(reloaded), expected, atol=1e-4)
