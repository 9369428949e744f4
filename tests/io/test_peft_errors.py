"""HF-PEFT folders that must be refused, and the rules of its configuration. No torch needed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.core.errors import FloraError, FormatError, PlanError, StructureError
from flora_jax.io.names import OUT_IN, NameMap, Rule
from flora_jax.io.peft_config import PeftConfig
from flora_jax.io.peft_modules import shortest
from flora_jax.io.safetensors import TensorFiles, save_one

NAMES = NameMap(
    rules=(
        Rule(r"layers/(.+)/kernel", r"model.layers.{layer}.\1.weight", OUT_IN),
        Rule(r"layers/(.+)/bias", r"model.layers.{layer}.\1.bias"),
        Rule("norm/scale", "model.norm.weight"),
    ),
    prefix="model.",
)
PARAMS = {
    "layers": {
        "q": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.zeros((2, 6))},
        "k": {"kernel": jnp.ones((2, 4, 4))},
    },
    "norm": {"scale": jnp.ones(4)},
}
A0 = "base_model.model.model.layers.0.q.lora_A.weight"
B1 = "base_model.model.model.layers.1.q.lora_B.weight"


def folder_of(path, rules=None, **kw):
    plan = flora.plan(PARAMS, rules or {".*/q/kernel": flora.LoRA(rank=2)})
    adapters = jax.tree.map(lambda x: x + 1, flora.init(plan, jax.random.key(0), PARAMS))
    io.save_peft(path, adapters, plan, PARAMS, NAMES, **kw)
    return plan, adapters


def edit_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path, change):
    file = path / "adapter_model.safetensors"
    tensors = {name: np.array(array) for name, array in TensorFiles(file).items()}
    change(tensors)
    save_one(file, tensors)


def load(path):
    return io.load_peft(path, PARAMS, NAMES)


def test_round_trip(tmp_path):
    plan, adapters = folder_of(tmp_path)
    again, arrays = load(tmp_path)
    assert again == plan
    jax.tree.map(np.testing.assert_array_equal, arrays, adapters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A0), rf"no '{A0}', needed for layers/q/kernel"),
        (lambda t: t.update({B1: np.ones((6, 3), np.float32)}), r"\(6, 3\).*needs \(6, 2\)"),
        (lambda t: t.update({A0 + "x": np.ones(1, np.float32)}), "1 tensors .* does not explain"),
        (lambda t: t.update({A0: t[A0].T.copy()}), r"shape \(4, 2\)"),
        (lambda t: t.update({B1.replace(".q.", ".k."): t[B1]}), "nearest used"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    folder_of(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(StructureError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "BOFT"}, "unknown peft_type 'BOFT'"),
        ({"peft_type": None}, "unknown peft_type"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"use_hypothetical": 3}, "use_hypothetical=3 is not supported"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"target_modules": None}, "target_modules=None is of a wrong type"),
        ({"target_modules": "(q"}, "not a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q": "4"}}, "rank_pattern gives 'q' '4'"),
        ({"r": 2.5}, "r=2.5 is not a whole number"),
        ({"bias": "vera_only"}, "bias='vera_only'"),
        ({"r": "2"}, "r='2' is not a number"),
    ],
)
def test_configurations_that_are_refused(tmp_path, changes, message):
    folder_of(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(FormatError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["v"]}, "matches no module; nearest"),
        ({"target_modules": ["q", "k"]}, "layers.0.k.lora_A"),
        ({"target_modules": ["0.q"]}, "does not explain"),
        ({"r": 3}, r"needs \(3, 4\)"),
        ({"rank_pattern": {"1.q": 1}}, r"needs \(1, 4\)"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "lora_only"}, "base_layer.bias"),
        ({"modules_to_save": ["norm"]}, "model.norm.weight"),
        ({"r": 9}, "needs"),
    ],
)
def test_configurations_that_the_file_contradicts(tmp_path, changes, message):
    folder_of(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(StructureError, match=message):
        load(tmp_path)


MISS = {".*/q/kernel": flora.MiSS(rank=3)}
OFT = {".*/q/kernel": flora.OFT(block_size=2)}


@pytest.mark.parametrize(
    ("rules", "changes", "message"),
    [
        (MISS, {"init_weights": "mnii"}, "init_weights='mnii' is not one of True, False, bat"),
        (MISS, {"r": 2.5}, "r=2.5 is not a whole number"),
        (MISS, {"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        (MISS, {"bias": "lora_only"}, "bias='lora_only'"),
        (OFT, {"peft_version": "0.17.1"}, "before PEFT 0.18"),
        (OFT, {"peft_version": None}, "before PEFT 0.18"),
        (OFT, {"r": 2}, "exactly one is above 0"),
        (OFT, {"oft_block_size": 0}, "exactly one is above 0"),
    ],
)
def test_shards_and_rotations_that_are_refused(tmp_path, rules, changes, message):
    folder_of(tmp_path, rules)
    edit_config(tmp_path, **changes)
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rules", "changes", "message"),
    [
        (MISS, {"r": 4}, r"needs \(4, 6\)"),
        (MISS, {"init_weights": "bat", "r": 2}, r"needs \(3, 2, 2\)"),
        (MISS, {"init_weights": "mini", "mini_r": 2}, r"needs \(3, 2\)"),
        (MISS, {"peft_type": "BONE"}, "q.bone_block"),
        (OFT, {"block_share": True}, r"needs \(1, 1\)"),
        (OFT, {"oft_block_size": 4}, r"needs \(1, 6\)"),
    ],
)
def test_shards_and_rotations_that_the_file_contradicts(tmp_path, rules, changes, message):
    folder_of(tmp_path, rules)
    edit_config(tmp_path, **changes)
    with pytest.raises(StructureError, match=message):
        load(tmp_path)


def test_an_old_oft_file(tmp_path):
    folder_of(tmp_path, OFT)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["oft_block_size"]
    file.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="before PEFT 0.14"):
        load(tmp_path)


@pytest.mark.parametrize("adapter", [flora.MiSS(rank=3), flora.Bone(rank=2)], ids=["true", "bat"])
def test_the_old_name_of_miss(tmp_path, adapter):
    """BONE: the same tensors under another name, read only."""
    plan, adapters = folder_of(tmp_path, {".*/q/kernel": adapter})

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("miss_block", "bone_block")] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"peft_type": "BONE"}
    config.pop("miss_dropout", None)
    file.write_text(json.dumps(config))
    again, arrays = load(tmp_path)
    assert again == plan
    jax.tree.map(np.testing.assert_array_equal, arrays, adapters)


def test_a_fresh_adapter_is_written_whole(tmp_path):
    """Layers at zero are left out of a stack, but not all of them."""
    plan = flora.plan(PARAMS, MISS)
    adapters = flora.init(plan, jax.random.key(0), PARAMS)
    io.save_peft(tmp_path, adapters, plan, PARAMS, NAMES)
    again, arrays = load(tmp_path)
    assert again == plan
    jax.tree.map(np.testing.assert_array_equal, arrays, adapters)


def test_pickles_and_missing_files(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        load(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        load(tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        load(tmp_path)


def test_values_are_asked_for_only_where_needed(tmp_path):
    folder_of(tmp_path)
    shapes = jax.eval_shape(lambda: PARAMS)
    plan, _ = io.load_peft(tmp_path, shapes, NAMES)
    assert len(plan) == 1
    folder_of(tmp_path / "dora", {".*/q/kernel": flora.DoRA(rank=2)})
    with pytest.raises(StructureError, match="values are needed"):
        io.load_peft(tmp_path / "dora", shapes, NAMES)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({".*/q/kernel": flora.FLoRA(ranks=2)}, "FLoRA has no HF-PEFT form"),
        ({".*/q/kernel": flora.LoRA(rank=2), ".*/k/kernel": flora.IA3()}, "of one method"),
        ({".*/q/kernel": flora.LoRA(rank=2), ".*/k/kernel": flora.DoRA(rank=2)}, "use_dora"),
        ({".*/q/kernel": flora.LoRA(dropout=0.1, rank=2), ".*/k/kernel": flora.LoRA(rank=2)},
         "one lora_dropout"),
        ({"norm/scale": flora.Replace()}, "nothing but replaced"),
        ({".*/q/kernel": flora.MiSS(rank=2, share="out")}, "layers/q/kernel: MiSS.*share='in' has"),
        ({".*/q/kernel": flora.Bone(rank=2, group="col")}, "group='row' has"),
        ({".*/q/kernel": flora.MiSS(rank=2), ".*/k/kernel": flora.Bone(rank=2)},
         "one init_weights"),
        ({".*/q/kernel": flora.MiSS(rank=2), ".*/k/kernel": flora.MiSS(rank=3)}, "has one r;"),
        ({".*/q/kernel": flora.OFT(block_size=2), ".*/k/kernel": flora.OFT(block_size=4)},
         "no r or oft_block_size gives all these block sizes: 4 of 4 at layers/k/kernel, 2 of 4"),
        ({".*/q/kernel": flora.OFT(block_size=2),
          ".*/k/kernel": flora.OFT(block_size=2, neumann_terms=0)}, "one neumann_terms"),
    ],
)  # fmt: skip
def test_plans_without_a_peft_form(tmp_path, rules, message):
    with pytest.raises(PlanError, match=message):
        folder_of(tmp_path / "new", rules)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(FormatError, match="overwrite=True"):
        folder_of(tmp_path)
    folder_of(tmp_path, overwrite=True)


def test_unknown_names_argument(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(FloraError, match="is not a NameMap"):
        io.load_peft(tmp_path, PARAMS, "llama")


def config(**values):
    return PeftConfig("test", {"target_modules": ["q"], **values})


def test_which_modules_are_targets():
    name = "model.layers.3.attn.q"
    assert config().targets(name, "linear")
    assert not config().targets("model.layers.3.attn.xq", "linear")
    assert not config(exclude_modules=["attn.q"]).targets(name, "linear")
    assert not config(exclude_modules=r".*\.3\..*").targets(name, "linear")
    assert not config(modules_to_save=["attn"]).targets(name, "linear")
    assert config(layers_to_transform=3).targets(name, "linear")
    assert not config(layers_to_transform=[1, 2]).targets(name, "linear")
    assert not config(layers_to_transform=[3], layers_pattern="h").targets(name, "linear")
    assert config(layers_to_transform=[3], layers_pattern=["h", "layers"]).targets(name, "linear")
    # A name given in full is taken before layers_to_transform is looked at.
    assert config(target_modules=[name], layers_to_transform=[1]).targets(name, "linear")
    assert config(target_modules="all-linear").targets(name, "linear")
    assert not config(target_modules="all-linear").targets("lm_head", "linear")
    assert not config(target_modules="all-linear").targets("embed", "embedding")
    assert not config(target_modules="q").targets(name, "linear")


def test_patterns_match_ends_and_the_first_wins():
    patterns = {"layers.0.q": 1, "q": 2, r"(v|k)_proj": 3}
    rank = lambda name: config(rank_pattern=patterns).patterned(name, "r", 8, "rank_pattern")
    assert [rank(n) for n in ("m.layers.0.q", "m.layers.1.q", "m.xq", "m.k_proj")] == [1, 2, 8, 3]


def test_shortest_names():
    names = ["m.0.a.q", "m.1.a.q", "m.0.b.q", "m.0.a", "m.0", "m"]
    assert shortest(["m.0.a.q", "m.1.a.q"], names) == ["a.q"]
    assert shortest(["m.0.a.q", "m.0.b.q", "m.1.a.q"], names) == ["q"]
    assert shortest(["m.norm"], ["m.norm", "m.pre_norm"], str.endswith) == ["m.norm"]
    with pytest.raises(PlanError, match="without naming 'pre_norm'"):
        shortest(["norm"], ["norm", "pre_norm"], str.endswith)
