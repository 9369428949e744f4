"""HF-PEFT adapters of a Llama, both ways, against PEFT itself on random tiny models."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
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

    def __init__(self, folder, *, tied=False, **options):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
        self.hf = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in self.hf.parameters():
                p.add_(0.2 * torch.randn_like(p))
        self.hf.save_pretrained(folder)
        self.model, self.params = io.load_hf(folder, **options)
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

    def ours(self, plan, adapters):
        return np.asarray(self.apply(flora.bind(self.params, adapters, plan)))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("tied"), tied=True)


def lora(**kw):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **kw})


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
