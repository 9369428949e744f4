"""HF-PEFT adapters of a Llama, both ways, against PEFT itself on random tiny models."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.core.errors import FloraError
from flora_jax.core.paths import flatten
from flora_jax.io.safetensors import TensorFiles

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IDS = np.random.default_rng(0).integers(0, 40, (2, 7))
QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Pair:
    """A transformers Llama and ours with the same weights."""

    def __init__(self, one):
        self.hf, self.model, self.params = one.hf, one.model, one.params
        self.apply = jax.jit(lambda p: self.model.apply({"params": p}, jnp.asarray(IDS))[0])

    def wrap(self, config):
        """A PEFT model with random adapter weights."""
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(self.hf), config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        return model

    def reload(self, folder):
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.hf), folder).eval()

    def load(self, folder, **kw):
        return io.load_peft(folder, self.params, self.model, **kw)

    def save(self, folder, adapters, plan, **kw):
        io.save_peft(folder, adapters, plan, self.params, self.model, **kw)

    def init(self, plan):
        """Fresh adapters, calibrated where the plan asks for it (not on IDS: KORE leaves those)."""
        run = lambda p, ids: self.model.apply({"params": p}, ids)[0]
        ids = np.random.default_rng(5).integers(0, 40, (9, 12))
        stats = flora.calibrate(run, self.params, plan, [jnp.asarray(ids)])
        return flora.init(plan, jax.random.key(0), self.params, stats=stats)

    def ours(self, plan, adapters):
        return np.asarray(self.apply(flora.bind(self.params, adapters, plan)))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def pair(tiny_llama):
    return Pair(tiny_llama())


@pytest.fixture(scope="module")
def tied(tiny_llama):
    return Pair(tiny_llama(tie_word_embeddings=True))


def lora(**kw):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **kw})


def oft(**kw):
    return peft.OFTConfig(**{"target_modules": ["q_proj", "v_proj", "down_proj"], **kw})


EXACT = {
    "lora": lambda: lora(task_type="CAUSAL_LM", lora_dropout=0.1),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "regex": lambda: lora(target_modules=r".*\.self_attn\.(q|k)_proj"),
    "rslora": lambda: lora(use_rslora=True, target_modules=["o_proj", "down_proj"]),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "bias-of-b": lambda: lora(lora_bias=True),
    "dora": lambda: lora(use_dora=True, target_modules=ALL),
    "patterns": lambda: lora(
        target_modules=ALL,
        rank_pattern={"(q|k)_proj": 2, "mlp.up_proj": 4},
        alpha_pattern={"k_proj": 7, r"model\.layers\.\d\.mlp\.down_proj": 1},
    ),
    "head": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "saved": lambda: lora(modules_to_save=["lm_head", "input_layernorm", "norm"]),
    "saved-bias": lambda: lora(modules_to_save=["k_proj"]),
    "biases": lambda: lora(bias="all"),
    "own-biases": lambda: lora(bias="lora_only"),
    "vera": lambda: peft.VeraConfig(r=6, target_modules=ALL),
    "vera-biases": lambda: peft.VeraConfig(r=6, target_modules=QV, bias="vera_only"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "miss": lambda: peft.MissConfig(r=6, miss_dropout=0.1, target_modules=ALL, bias="miss_only"),
    "miss-random": lambda: peft.MissConfig(r=8, init_weights=False, target_modules="all-linear"),
    "miss-mini": lambda: peft.MissConfig(r=5, mini_r=4, init_weights="mini", target_modules=ALL),
    "miss-bat": lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=ALL),
    "oft": lambda: oft(oft_block_size=8, module_dropout=0.1, bias="oft_only"),
    "oft-exact": lambda: oft(r=4, oft_block_size=0, use_cayley_neumann=False),
    "oft-shared": lambda: oft(oft_block_size=4, block_share=True, num_cayley_neumann_terms=3),
    "oft-adjusted": lambda: oft(oft_block_size=11, num_cayley_neumann_terms=2),
    "oft-embedding": lambda: oft(oft_block_size=8, target_modules=["embed_tokens", "q_proj"]),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=ALL, rank_pattern={"mlp.up_proj": 3}, rank_dropout=0.1
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=ALL, alpha_pattern={"q_proj": 5}, module_dropout=0.1
    ),
    "lokr-both": lambda: peft.LoKrConfig(
        r=1, target_modules=QV, decompose_both=True, decompose_factor=4, modules_to_save=["norm"]
    ),
}
# Layers of one scanned stack that differ: padded here, so other tensors go back out.
RAGGED = {
    "one-layer": lambda: lora(layers_to_transform=[1]),
    "ranks": lambda: lora(rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, use_rslora=True),
    "dora": lambda: lora(
        use_dora=True, layers_to_transform=0, layers_pattern="layers", rank_pattern={"q_proj": 1}
    ),
    "scales": lambda: lora(alpha_pattern={"1.self_attn.v_proj": 2}, lora_bias=True),
    "pissa-layer": lambda: lora(init_lora_weights="pissa", target_modules=["1.mlp.up_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=r".*layers\.1.*k_proj", feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=ALL, layers_to_transform=[0]),
    "miss": lambda: peft.MissConfig(r=6, target_modules=QV, layers_to_transform=[1]),
    "miss-bat": lambda: peft.MissConfig(
        r=4, init_weights="bat", target_modules=QV, layers_to_transform=[0]
    ),
    "oft-coft": lambda: oft(oft_block_size=8, coft=True, eps=0.5, layers_to_transform=[0]),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=QV, rank_pattern={"0.self_attn.q_proj": 3}
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=1, target_modules=ALL, rank_pattern={"1.self_attn.q_proj": 2}, layers_to_transform=[1]
    ),
    "saved-layer": lambda: lora(modules_to_save=["layers.1.mlp.up_proj"]),
}


def tensors(folder):
    """Of a file, without the base's tables, which PEFT repeats beside an adapted vocabulary."""
    files = TensorFiles(folder / "adapter_model.safetensors")
    return {name: files[name] for name in files if not name.endswith("base_layer.weight")}


def same_tensors(one, two):
    one, two = tensors(one), tensors(two)
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("case", EXACT)
def test_file_of_peft_and_back(pair, tmp_path, case):
    theirs = pair.wrap(EXACT[case]())
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = pair.load(tmp_path / "a")
    expected = logits(theirs)
    assert np.abs(expected - logits(pair.hf)).max() > 0.01
    np.testing.assert_allclose(pair.ours(plan, adapters), expected, atol=1e-4)
    pair.save(tmp_path / "b", adapters, plan)
    same_tensors(tmp_path / "a", tmp_path / "b")
    np.testing.assert_allclose(logits(pair.reload(tmp_path / "b")), expected, atol=1e-5)


@pytest.mark.parametrize("case", RAGGED)
def test_layers_that_differ(pair, tmp_path, case):
    theirs = pair.wrap(RAGGED[case]())
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = pair.load(tmp_path / "a")
    np.testing.assert_allclose(pair.ours(plan, adapters), logits(theirs), atol=1e-4)
    pair.save(tmp_path / "b", adapters, plan)
    np.testing.assert_allclose(logits(pair.reload(tmp_path / "b")), logits(theirs), atol=1e-4)
    again = pair.load(tmp_path / "b")
    np.testing.assert_allclose(pair.ours(*again), logits(theirs), atol=1e-4)


def perturbed(adapters, plan):
    """As if trained: noise on what trains, frozen buffers as they are."""
    train, frozen = flora.partition(adapters, plan)
    rng = np.random.default_rng(3)
    noisy = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape)), train)
    noisy = jax.tree.map(lambda new, old: new.astype(old.dtype), noisy, train)
    return flora.combine(noisy, frozen)


MADE_HERE = {
    "lora": {r".*/(q|v)_proj/kernel": flora.LoRA(rank=4, alpha=6.0)},
    "two-ranks": {
        r".*/q_proj/kernel": flora.LoRA(rank=2, alpha=6.0, use_bias=True),
        r".*/v_proj/kernel": flora.LoRA(rank=3, rslora=True, use_bias=True),
    },
    "bias-of-one": {
        r".*/q_proj/kernel": flora.LoRA(rank=2, use_bias=True),
        r".*/v_proj/kernel": flora.LoRA(rank=2),
    },
    "pissa": {r".*/(q|down)_proj/kernel": flora.PiSSA(rank=2, alpha=3.0)},
    "pissa-and-lora": {
        r".*/up_proj/kernel": flora.OLoRA(rank=2, rslora=True),
        r".*/o_proj/kernel": flora.LoRA(rank=2),
    },
    "kore": {r".*/(q|down)_proj/kernel": flora.KORE(rank=2, scale=0.5)},
    "kore-both-and-lora": {
        r".*/up_proj/kernel": flora.KORE(rank=2, train_a=True),
        r".*/o_proj/kernel": flora.LoRA(rank=2),
    },
    "dora": {r".*/(k|up)_proj/kernel": flora.DoRA(rank=2)},
    "vera": {r"layers/.*/(q|k|down)_proj/kernel": flora.VeRA(rank=5, seed=3)},
    "vera-stored": {r".*/(gate|o)_proj/kernel": flora.VeRA(rank=5, stored=True)},
    "ia3": {
        r".*/(k|v)_proj/kernel": flora.IA3(),
        r".*/down_proj/kernel": flora.IA3(scale="input"),
    },
    "miss": {r".*/(k|v)_proj/kernel": flora.MiSS(rank=7)},
    "bone": {r".*/(q|up)_proj/kernel": flora.Bone(rank=8)},
    "oft": {r".*/(q|down)_proj/kernel": flora.OFT(block_size=16, coft=True, eps=0.3)},
    "oft-blocks": {r".*/(q|down)_proj/kernel": flora.OFT(blocks=4, neumann_terms=0)},
    "lora-and-norms": {
        r".*/q_proj/kernel": flora.LoRA(rank=2),
        r".*norm/scale": flora.Replace(),
        "lm_head/kernel": flora.Replace(),
    },
    "all-biases": {r".*/q_proj/kernel": flora.LoRA(rank=2), r".*/bias": flora.Replace()},
    "part-of-a-module": {
        r".*/q_proj/kernel": flora.LoRA(rank=2),
        r".*/v_proj/kernel": flora.Replace(),
    },
    "loha": {r".*/(q|down)_proj/kernel": flora.LoHa(rank=2, alpha=3.0)},
    "lokr": {
        r".*/q_proj/kernel": flora.LoKr(rank=1, alpha=0.5),
        r".*/up_proj/kernel": flora.LoKr(rank=9),
    },
    "embedding": {"embed_tokens/embedding": flora.LoRA(rank=4)},
}


@pytest.mark.parametrize("case", MADE_HERE)
def test_adapters_made_here(pair, tmp_path, case):
    plan = flora.plan(pair.params, MADE_HERE[case])
    adapters = perturbed(pair.init(plan), plan)
    pair.save(tmp_path, adapters, plan, base_model="some/base", task_type="CAUSAL_LM")
    expected = pair.ours(plan, adapters)
    assert np.abs(expected - logits(pair.hf)).max() > 0.01
    np.testing.assert_allclose(logits(pair.reload(tmp_path)), expected, atol=1e-4)
    again = pair.load(tmp_path)
    np.testing.assert_allclose(pair.ours(*again), expected, atol=1e-4)


def test_kore_is_a_lora_of_its_own_rank(pair, tmp_path):
    plan = flora.plan(pair.params, {r".*/q_proj/kernel": flora.KORE(rank=3, scale=0.5)})
    adapters = perturbed(pair.init(plan), plan)
    pair.save(tmp_path / "a", adapters, plan)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 1.5)
    with pytest.raises(FloraError, match="folded into the base"):
        pair.save(tmp_path / "b", flora.rebase(pair.params, adapters, plan)[1], plan)


def test_configuration_is_short(pair, tmp_path):
    plan = flora.plan(
        pair.params,
        {
            r".*/(q|v)_proj/kernel": flora.LoRA(rank=4, alpha=6.0, dropout=0.1),
            r".*/o_proj/kernel": flora.LoRA(rank=2, alpha=6.0, dropout=0.1),
        },
    )
    adapters = flora.init(plan, jax.random.key(0), pair.params)
    pair.save(tmp_path, adapters, plan)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["rank_pattern"]) == (4, {"o_proj": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6, {})
    assert config["lora_dropout"] == 0.1
    again, _ = pair.load(tmp_path)
    assert again == plan


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_factors_of_the_weight(pair, tmp_path, way):
    config = lora(init_lora_weights=way, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(pair.hf), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = way
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "as-is")
    plan, adapters = pair.load(tmp_path / "as-is")
    assert {type(e.adapter) for e in plan} == {{"pissa": flora.PiSSA, "olora": flora.OLoRA}[way]}
    np.testing.assert_allclose(pair.ours(plan, adapters), expected, atol=1e-4)
    based = flora.rebase(pair.params, adapters, plan)
    with pytest.raises(FloraError, match="folded into the base"):
        pair.save(tmp_path / "rebased", based[1], plan)
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=start)
    plan, adapters = pair.load(tmp_path / "lora")
    assert {type(e.adapter) for e in plan} == {flora.LoRA}
    np.testing.assert_allclose(pair.ours(plan, adapters), expected, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_embedding(pair, tmp_path, dora):
    theirs = pair.wrap(lora(target_modules=["embed_tokens", "q_proj"], use_dora=dora))
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = pair.load(tmp_path / "a")
    np.testing.assert_allclose(pair.ours(plan, adapters), logits(theirs), atol=1e-4)
    pair.save(tmp_path / "b", adapters, plan)
    same_tensors(tmp_path / "a", tmp_path / "b")
    np.testing.assert_allclose(logits(pair.reload(tmp_path / "b")), logits(theirs), atol=1e-5)


def test_tied_embedding(tied, tmp_path):
    alone = tied.wrap(lora(target_modules=["embed_tokens"]))
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(FloraError, match="ensure_weight_tying"):
        tied.load(tmp_path / "alone")
    plan = flora.plan(tied.params, {"embed_tokens/embedding": flora.LoRA(rank=3)})
    adapters = perturbed(flora.init(plan, jax.random.key(0), tied.params), plan)
    tied.save(tmp_path / "both", adapters, plan)
    theirs = tied.reload(tmp_path / "both")
    np.testing.assert_allclose(logits(theirs), tied.ours(plan, adapters), atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    again = tied.load(tmp_path / "again")
    np.testing.assert_allclose(tied.ours(*again), logits(theirs), atol=1e-4)


def test_tied_table_saved_whole(tied, tmp_path):
    rules = {"embed_tokens/embedding": flora.Replace(), ".*/q_proj/kernel": flora.LoRA(rank=2)}
    plan = flora.plan(tied.params, rules)
    adapters = perturbed(flora.init(plan, jax.random.key(0), tied.params), plan)
    tied.save(tmp_path / "a", adapters, plan)
    theirs = tied.reload(tmp_path / "a")
    np.testing.assert_allclose(logits(theirs), tied.ours(plan, adapters), atol=1e-4)
    theirs.save_pretrained(tmp_path / "b")
    np.testing.assert_allclose(tied.ours(*tied.load(tmp_path / "b")), logits(theirs), atol=1e-4)


def test_body_without_its_head(pair, tmp_path):
    body = copy.deepcopy(pair.hf.model)
    theirs = peft.get_peft_model(body, lora(target_modules=r"layers\.\d\.self_attn\.q_proj"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.add_(0.2 * torch.randn_like(p))
        expected = theirs.eval()(torch.tensor(IDS)).last_hidden_state.numpy()
    theirs.save_pretrained(tmp_path)
    plan, adapters = pair.load(tmp_path)
    bound = flora.bind(pair.params, adapters, plan)
    hidden, _ = pair.model.apply({"params": bound}, jnp.asarray(IDS), output="hidden")
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_unrolled_layers(pair, tmp_path):
    theirs = pair.wrap(lora(target_modules=ALL, use_dora=True, rank_pattern={"1.mlp.up_proj": 5}))
    theirs.save_pretrained(tmp_path / "a")
    pair.hf.save_pretrained(tmp_path / "base")
    model, params = io.load_hf(tmp_path / "base", scan_layers=False)
    plan, adapters = io.load_peft(tmp_path / "a", params, model)
    assert plan["layers_1/mlp/up_proj/kernel"].adapter.rank == 5
    out, _ = model.apply({"params": flora.bind(params, adapters, plan)}, jnp.asarray(IDS))
    np.testing.assert_allclose(out, logits(theirs), atol=1e-4)
    io.save_peft(tmp_path / "b", adapters, plan, params, model)
    same_tensors(tmp_path / "a", tmp_path / "b")


def test_half_precision_is_kept(pair, tmp_path):
    theirs = pair.wrap(lora()).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "a")
    plan, adapters = pair.load(tmp_path / "a")
    assert {str(x.dtype) for x in flatten(adapters).values()} == {"bfloat16"}
    pair.save(tmp_path / "b", adapters, plan)
    same_tensors(tmp_path / "a", tmp_path / "b")
    _, wide = pair.load(tmp_path / "a", dtype=jnp.float32)
    assert {str(x.dtype) for x in flatten(wide).values()} == {"float32"}
