"""Hugging Face name maps of the encoders: BERT, ViT and DINOv2.

``flora_jax.io.load_hf`` and ``save_hf`` use them. A body saved on its own (``BertModel``) has
bare names; under a head its names start with ``bert.``, ``vit.`` or ``dinov2.``.
"""

from __future__ import annotations

from flora_jax.io.names import OIHW, OUT_IN, NameMap, Rule, register


def _affine(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Kernel, norm scale and bias of one module."""
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", OUT_IN),
        Rule(f"{ours}/scale", f"{theirs}.weight"),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


def _bert(body: str) -> tuple[Rule, ...]:
    return (
        *_affine("classifier", "classifier"),
        Rule(r"embeddings/(.+)/embedding", rf"{body}embeddings.\1.weight"),
        *_affine("embeddings/LayerNorm", f"{body}embeddings.LayerNorm"),
        Rule(r"layers/(attention/self/attention/.+)", rf"{body}encoder.layer.{{layer}}.\1"),
        *_affine(r"layers/(.+)", rf"{body}encoder.layer.{{layer}}.\1"),
        *_affine("pooler/dense", f"{body}pooler.dense"),
    )


def _vit(body: str, *layer_names: tuple[str, str]) -> tuple[Rule, ...]:
    layer = f"{body}encoder.layer.{{layer}}"
    renamed = [rule for a, b in layer_names for rule in _affine(f"layers/{a}", f"{layer}.{b}")]
    patches = f"{body}embeddings.patch_embeddings.projection"
    return (
        *_affine("classifier", "classifier"),
        Rule("embeddings/patch_embeddings/projection/kernel", f"{patches}.weight", OIHW),
        Rule("embeddings/patch_embeddings/projection/bias", f"{patches}.bias"),
        Rule(r"embeddings/(\w+)", rf"{body}embeddings.\1"),
        Rule(r"layers/(attention/attention/attention/.+)", rf"{layer}.\1"),
        *renamed,
        Rule(r"layers/(layer_scale\d/lambda1)", rf"{layer}.\1"),
        *_affine(r"layers/(.+)", rf"{layer}.\1"),
        *_affine("layernorm", f"{body}layernorm"),
        *_affine("pooler/dense", f"{body}pooler.dense"),
    )


_PLAIN = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("mlp/fc1", "intermediate.dense"),
    ("mlp/fc2", "output.dense"),
)
# The pooler is left behind only by a configuration that has no use for it.
_SPARE = (r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\..*")
# The names of the first checkpoints (bert-base-uncased is one).
_LEGACY = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}

BERT = register("BertModel", table=NameMap(_bert(""), ignore=_SPARE, legacy=_LEGACY))
# A pretraining or next-sentence head is left behind: what is read is the encoder.
BERT_HEADED = register(
    "bert",
    table=NameMap(_bert("bert."), prefix="bert.", ignore=(*_SPARE, r"cls\..*"), legacy=_LEGACY),
)
VIT = register("ViTModel", table=NameMap(_vit("", *_PLAIN)))
VIT_HEADED = register("vit", table=NameMap(_vit("vit.", *_PLAIN), prefix="vit."))
DINOV2 = register("Dinov2Model", table=NameMap(_vit("")))
DINOV2_HEADED = register("dinov2", table=NameMap(_vit("dinov2."), prefix="dinov2."))
