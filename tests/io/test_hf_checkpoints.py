"""Strictness and name maps of Hugging Face checkpoints, without transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io, models
from flora_jax.core.errors import ConfigError, FormatError, StructureError
from flora_jax.core.paths import flatten
from flora_jax.io import safetensors as sf
from flora_jax.io.hf import LLAMA
from flora_jax.io.names import NameMap, Rule
from flora_jax.models import Llama, LlamaConfig


@pytest.fixture
def folder(tmp_path):
    model = Llama(LlamaConfig.tiny(tie_word_embeddings=True))
    filled = lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype)  # noqa: E731
    io.save_hf(tmp_path / "m", model, jax.tree.map(filled, models.abstract(model)))
    return tmp_path / "m"


def edit(folder, change):
    tensors = {name: np.array(array) for name, array in sf.TensorFiles(folder).items()}
    change(tensors)
    sf.save(folder, tensors, overwrite=True)


def test_round_trip_is_exact(folder, tmp_path):
    model, params = io.load_hf(folder)
    io.save_hf(tmp_path / "again", model, params, max_shard_bytes=100_000)
    assert (tmp_path / "again" / sf.INDEX).is_file()
    again, back = io.load_hf(tmp_path / "again")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, back)
    with pytest.raises(FormatError, match="overwrite"):
        io.save_hf(tmp_path / "again", model, params)


def test_missing_tensor(folder):
    edit(folder, lambda t: t.update({"model.norm.wieght": t.pop("model.norm.weight")}))
    with pytest.raises(StructureError, match=r"missing 'model.norm.weight'; .*'?model.norm.wieght"):
        io.load_hf(folder)


def test_extra_tensor(folder):
    edit(folder, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": np.ones(2)}))
    with pytest.raises(StructureError, match=r"unexpected 'model.layers.9.mlp.up_proj.weight'"):
        io.load_hf(folder)


def test_misshaped_tensor(folder):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((3, 4), np.float32)

    edit(folder, change)
    with pytest.raises(StructureError, match=r"layers.1.mlp.up_proj.weight has shape \(3, 4\)"):
        io.load_hf(folder)


def test_buffers_and_equal_copies_are_accepted(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit(folder, change)
    _, params = io.load_hf(folder)
    assert "lm_head" not in params
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(StructureError, match="differs"):
        io.load_hf(folder)


def test_config_errors(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unknown architecture 'mamba'"):
        io.load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="config.json"):
        io.load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match="no such file"):
        io.load_hf(folder)


def test_forged_number_of_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(StructureError, match="1000000000 layers, but 20 tensors"):
        io.load_hf(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    with pytest.raises(ConfigError, match="num_hidden_layers=0"):
        io.load_hf(folder)


def test_adapted_parameters_are_not_written(folder, tmp_path):
    model, params = io.load_hf(folder)
    plan = flora.plan(params, {r".*/q_proj/kernel": flora.LoRA(rank=2)})
    bound = flora.bind(params, flora.init(plan, jax.random.key(0), params), plan)
    with pytest.raises(StructureError, match="materialize"):
        io.save_hf(tmp_path / "bound", model, bound)
    assert not (tmp_path / "bound").exists()
    io.save_hf(tmp_path / "merged", model, flora.materialize(bound))


def test_dtype_option(folder):
    _, params = io.load_hf(folder, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {"bfloat16"}


def test_name_index_is_the_inverse():
    shapes = models.abstract(Llama(LlamaConfig.tiny()))
    index = LLAMA.index(shapes)
    assert index["model.layers.1.self_attn.o_proj.weight"] == ("layers/self_attn/o_proj/kernel", 1)
    assert index["lm_head.weight"] == ("lm_head/kernel", None)
    names = [name for slot in LLAMA.slots(shapes).values() for name in slot.names]
    assert sorted(names) == sorted(index)


def test_a_path_without_a_rule():
    table = NameMap((Rule("a/kernel", "a.weight"),))
    with pytest.raises(StructureError, match="no name rule for 'b/kernel'"):
        table.slot("b/kernel", (2, 2))
