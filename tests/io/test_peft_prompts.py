"""PROMPT_TUNING and PREFIX_TUNING folders both ways, against PEFT on random tiny models."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.core.errors import FloraError, FormatError, PlanError
from flora_jax.core.ops import virtual_rows
from flora_jax.data import with_prompt
from flora_jax.io.safetensors import TensorFiles, save_one

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

P = 3
IDS = np.random.default_rng(0).integers(0, 40, (2, 7))
MASK = np.ones((2, 7), np.int64)
MASK[1, 5:] = 0
KV = {
    "llama": r"layers/self_attn/(k|v)_proj/kernel",
    "bert": r"layers/attention/self/(key|value)/kernel",
}
TABLE = {"llama": "embed_tokens/embedding", "bert": "embeddings/word_embeddings/embedding"}


class Pair:
    """A transformers model and ours with the same weights."""

    def __init__(self, kind, folder):
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 40,
        }
        if kind == "llama":
            config = transformers.LlamaConfig(
                num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, **sizes
            )
            self.hf = transformers.LlamaForCausalLM(config).eval()
        else:
            self.hf = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
        with torch.no_grad():
            for p in self.hf.parameters():
                p.add_(0.2 * torch.randn_like(p))
        self.hf.save_pretrained(folder)
        self.kind, (self.model, self.params) = kind, io.load_hf(folder)
        self.task = "CAUSAL_LM" if kind == "llama" else "FEATURE_EXTRACTION"

    def wrap(self, method, **options):
        config = getattr(peft, f"{method}Config")
        torch.manual_seed(1)
        config = config(num_virtual_tokens=P, task_type=self.task, **options)
        return peft.get_peft_model(copy.deepcopy(self.hf), config).eval()

    def theirs(self, model):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
        out = out.logits if self.kind == "llama" else out.last_hidden_state
        return out.numpy()[:, -7:]

    def ours(self, plan, adapters):
        bound = flora.bind(self.params, adapters, plan)
        batch = with_prompt(bound, {"tokens": jnp.asarray(IDS), "mask": jnp.asarray(MASK)})
        run = jax.jit(self._apply)
        return np.asarray(run(bound, batch["tokens"], batch["mask"]))[:, -7:]

    def _apply(self, bound, tokens, mask):
        if self.kind == "llama":
            return self.model.apply({"params": bound}, tokens)[0]
        return self.model.apply({"params": bound}, tokens, mask, output="hidden")


@pytest.fixture(scope="module", params=["llama", "bert"])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Pair("llama", tmp_path_factory.mktemp("alone"))


def close(a, b):
    """At the tokens: what padding computes differs and nobody sees it."""
    np.testing.assert_allclose(a[MASK > 0], b[MASK > 0], atol=1e-4, rtol=1e-4)


CASES = {
    "prompt": ("PromptTuning", {}),
    "prefix": ("PrefixTuning", {}),
    "projected": ("PrefixTuning", {"prefix_projection": True, "encoder_hidden_size": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_and_writes_what_peft_does(pair, case, tmp_path):
    method, options = CASES[case]
    model = pair.wrap(method, **options)
    model.save_pretrained(tmp_path / "theirs")
    plan, adapters = io.load_peft(tmp_path / "theirs", pair.params, pair.model)
    where = TABLE if method == "PromptTuning" else KV
    adapter = getattr(flora, method)(tokens=P)
    assert plan == flora.plan(pair.params, {where[pair.kind]: adapter})
    theirs = pair.theirs(model)
    close(pair.ours(plan, adapters), theirs)
    assert np.abs(theirs - pair.theirs(pair.hf)).max() > 1e-2

    moved = jax.tree.map(lambda a: a * 1.5, adapters)
    io.save_peft(tmp_path / "ours", moved, plan, pair.params, pair.model, task_type=pair.task)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.hf), tmp_path / "ours").eval()
    close(pair.theirs(again), pair.ours(plan, moved))
    back = io.load_peft(tmp_path / "ours", pair.params, pair.model)
    assert back[0] == plan
    jax.tree.map(np.testing.assert_array_equal, back[1], moved)


def test_a_trained_network_is_written_as_its_table(llama, tmp_path):
    adapter = flora.PrefixTuning(tokens=P, projection=5)
    plan = flora.plan(llama.params, {KV["llama"]: adapter})
    adapters = flora.init(plan, jax.random.key(0), llama.params)
    io.save_peft(tmp_path, adapters, plan, llama.params, llama.model, task_type="CAUSAL_LM")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(llama.hf), tmp_path).eval()
    close(llama.theirs(again), llama.ours(plan, adapters))


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    plan = flora.plan(llama.params, {KV["llama"]: flora.PrefixTuning(tokens=P)})
    adapters = flora.init(plan, jax.random.key(0), llama.params)
    io.save_peft(folder, adapters, plan, llama.params, llama.model)
    return folder


def table(rows, columns, name="prompt_embeddings"):
    return {name: np.zeros((rows, columns), np.float32)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, table(P, 63), r"shape \(3, 63\), 2 layers need \(3, 64\)"),
        ({"num_virtual_tokens": 4}, None, r"2 layers need \(4, 64\)"),
        ({"num_virtual_tokens": "3"}, None, "num_virtual_tokens='3' is not a positive number"),
        ({}, table(P, 64, "prompt_embedding"), "no 'prompt_embeddings'"),
        ({}, table(P, 64) | table(1, 1, "other"), "tensors beside 'prompt_embeddings': 'other'"),
        ({"num_transformer_submodules": 2}, None, "an encoder and a decoder"),
        ({"prefix_tokens": 3}, None, "prefix_tokens=3 is not supported; nearest known: prefix_pro"),
        ({"peft_type": "PROMPT_TUNING"}, None, r"3 tokens of embed_tokens/embedding need \(3, 32"),
    ],
)
def test_wrong_files_are_errors(llama, saved, tmp_path, config, tensors, message):
    values = json.loads((saved / "adapter_config.json").read_text()) | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    tensors = tensors or dict(TensorFiles(saved / "adapter_model.safetensors"))
    save_one(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(FloraError, match=message):
        io.load_peft(tmp_path, llama.params, llama.model)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({KV["llama"]: flora.PrefixTuning(), TABLE["llama"]: flora.PromptTuning()}, "stand alone"),
        ({KV["llama"]: flora.PrefixTuning(), ".*/q_proj/kernel": flora.LoRA()}, "another method"),
        ({"layers/self_attn/k_proj/kernel": flora.PrefixTuning()}, "v_proj/kernel has none"),
        (
            {
                "layers/self_attn/k_proj/kernel": flora.PrefixTuning(tokens=2),
                "layers/self_attn/v_proj/kernel": flora.PrefixTuning(tokens=3),
            },
            "their lengths or widths differ",
        ),
    ],
)
def test_plans_that_peft_cannot_express(llama, tmp_path, rules, message):
    plan = flora.plan(llama.params, rules)
    adapters = flora.init(plan, jax.random.key(0), llama.params)
    with pytest.raises(PlanError, match=message):
        io.save_peft(tmp_path, adapters, plan, llama.params, llama.model)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten_and_ids_follow_the_table(llama, saved):
    plan, adapters = io.load_peft(saved, llama.params, llama.model)
    with pytest.raises(FormatError, match="already holds"):
        io.save_peft(saved, adapters, plan, llama.params, llama.model)
    assert virtual_rows(flora.bind(llama.params, adapters, plan)) is None
