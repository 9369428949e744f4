"""GGUF checkpoints of the Llama family, dequantised on reading; written in float or 4, 8 bits.

GGUF of architecture ``llama`` keeps the rows of q and k in the order of interleaved rotation
pairs; they are brought to the half-split order on reading and back on writing. Qwen's are not
permuted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType

from flora_jax.core.errors import ConfigError, FormatError, StructureError, unknown
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.core.paths import flatten
from flora_jax.io.files import atomic
from flora_jax.io.gguf_header import Header, TensorInfo, read_header
from flora_jax.io.gguf_tokenizer import read_tokenizer, write_tokenizer
from flora_jax.io.names import OUT_IN, NameMap, Rule, Theirs, to_ours
from flora_jax.io.tokenizer import Tokenizer
from flora_jax.models import registry
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.models.rope import Rope

FAMILIES = ("llama", "qwen2", "qwen3")
STORED = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
}
FREQS = "rope_freqs.weight"

_PARTS = {
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn/q_norm": "attn_q_norm",
    "self_attn/k_norm": "attn_k_norm",
}
NAMES = NameMap(
    rules=(
        Rule("embed_tokens/embedding", "token_embd.weight"),
        *(
            Rule(f"layers/{ours}/kernel", f"blk.{{layer}}.{name}.weight", OUT_IN)
            for ours, name in _PARTS.items()
        ),
        *(
            Rule(f"layers/{ours}/bias", f"blk.{{layer}}.{name}.bias")
            for ours, name in _PARTS.items()
        ),
        *(
            Rule(f"layers/{ours}/scale", f"blk.{{layer}}.{name}.weight")
            for ours, name in _NORMS.items()
        ),
        Rule("norm/scale", "output_norm.weight"),
        Rule("lm_head/kernel", "output.weight", OUT_IN),
    ),
    ignore=(re.escape(FREQS),),
)


def heads_of(name: str, config: LlamaConfig) -> int | None:
    """Heads of a tensor whose rows GGUF permutes, ``None`` for the others."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if config.family.startswith("qwen") or match is None:
        return None
    return config.num_attention_heads if match[1] == "q" else config.num_key_value_heads


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows ``[heads * H, ...]`` from interleaved pairs to halves.

    >>> half_split(np.arange(4), 1).tolist()
    [0, 2, 1, 3]
    """
    parts = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`half_split`."""
    parts = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


class GGUFTensors(Mapping[str, np.ndarray]):
    """A file's tensors in float32, dequantised and un-permuted one by one when asked for."""

    def __init__(self, header: Header, config: LlamaConfig):
        self.header, self.config = header, config
        self.bytes = map_bytes(header.path)

    def __getitem__(self, name: str) -> np.ndarray:
        array = dequantize(self.bytes, self.header.tensors[name], f"{self.header.path}: {name}")
        heads = heads_of(name, self.config)
        return array if heads is None else half_split(array, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)


def map_bytes(path: Path) -> np.ndarray:
    """The file as a memory map; a plain array, whose views are cheaper than a ``memmap``'s."""
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def dequantize(data: np.ndarray, info: TensorInfo, where: str) -> np.ndarray:
    """One tensor in float32.

    Raises:
      FormatError: a type that the ``gguf`` package cannot dequantise.
    """
    raw = data[info.offset : info.offset + info.nbytes]
    if info.kind == GGMLQuantizationType.F32:
        return raw.view("<f4").reshape(info.shape)
    if info.kind == GGMLQuantizationType.F16:
        return raw.view("<f2").reshape(info.shape).astype(np.float32)
    if info.kind == GGMLQuantizationType.BF16:
        return raw.view(ml_dtypes.bfloat16).reshape(info.shape).astype(np.float32)
    rows = raw.reshape(*info.shape[:-1], -1)
    try:
        return gguf.quants.dequantize(rows, info.kind)
    except NotImplementedError:
        raise FormatError(f"{where} is stored as {info.kind.name}: not supported") from None


def read_config(header: Header, **options: Any) -> LlamaConfig:
    """The hyper-parameters in a file's metadata; options are fields of :class:`LlamaConfig`.

    Raises:
      ConfigError: another architecture.
      FormatError: a value is missing, or does not fit the tensors.
    """
    family = header.need("general.architecture")
    if family not in FAMILIES:
        raise ConfigError(f"{header.path}: {unknown('GGUF architecture', str(family), FAMILIES)}")
    tensors = header.tensors
    get = lambda key, default: header.fields.get(f"{family}.{key}", default)  # noqa: E731

    def count(key: str, *fallback: int) -> int:
        value = get(key, fallback[0]) if fallback else header.need(f"{family}.{key}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{header.path}: {family}.{key} is {value!r}, not a positive integer")
        return value

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise StructureError(f"{header.path}: missing {name!r}, or it is no matrix")
        return tensors[name].shape[0]

    heads, width = count("attention.head_count"), count("embedding_length")
    dim = count("attention.key_length", get("rope.dimension_count", width // heads))
    epsilon = header.need(f"{family}.attention.layer_norm_rms_epsilon")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    # What a forged number would blow up is compared with the tensors before it is used.
    layers = count("block_count")
    if layers != len(blocks):
        raise FormatError(
            f"{header.path}: block_count {layers}, but tensors of {len(blocks)} blocks"
        )
    if rows("blk.0.attn_q.weight") != heads * dim:
        raise FormatError(f"{header.path}: {heads} heads of {dim} do not fit blk.0.attn_q.weight")
    values = {
        "family": family,
        "vocab_size": rows("token_embd.weight"),
        "hidden_size": width,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": dim,
        "max_position_embeddings": count("context_length"),
        # Stored in float32: nine digits would make 1e-05 read 9.99999975e-06.
        "rms_norm_eps": float(f"{float(epsilon):.6g}"),
        "rope": _read_rope(header, family, count("context_length")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "sliding_window": get("attention.sliding_window", None),
        "bos_token_id": header.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.fields.get("tokenizer.ggml.padding_token_id"),
    }
    return LlamaConfig(**(values | options))


def _read_rope(header: Header, family: str, length: int) -> Rope:
    get = lambda key, default: header.fields.get(f"{family}.rope.{key}", default)  # noqa: E731
    theta = float(get("freq_base", 10000.0))
    kind = get("scaling.type", "none")
    original = int(get("scaling.original_context_length", length))
    if FREQS in header.tensors:
        return _read_llama3(header, theta)
    if kind == "none":
        return Rope(theta=theta)
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"{header.path}: {unknown('rope scaling', kind, ('linear', 'yarn'))}")
    factor = float(get("scaling.factor", 1.0))
    return Rope(kind=kind, theta=theta, factor=factor, original_length=original)


def _read_llama3(header: Header, theta: float) -> Rope:
    """Llama 3 is stored as the divisors of its frequencies, from which its constants are told."""
    divisors = dequantize(map_bytes(header.path), header.tensors[FREQS], f"{header.path}: {FREQS}")
    plain = Rope(theta=theta).inv_freq(2 * divisors.size)
    for original in (8192, 4096, 16384, 32768):
        rope = Rope(
            kind="llama3", theta=theta, factor=float(divisors.max()), original_length=original
        )
        if np.allclose(plain / rope.inv_freq(2 * divisors.size), divisors, rtol=1e-3):
            return rope
    raise ConfigError(f"{header.path}: {FREQS} are not the divisors of Llama 3's rotation")


def load_gguf(
    file: str | Path, *, dtype: Any = "float32", **options: Any
) -> tuple[Llama, dict[str, Any], Tokenizer | None]:
    """A model, its parameters and its tokenizer from a GGUF file.

    Args:
      dtype: of the parameters, dequantised.
      options: fields of :class:`LlamaConfig`, e.g. ``remat="full"``.

    Returns:
      ``(model, params, tokenizer)``; no tokenizer if the file has none.

    Raises:
      FormatError: truncated, forged, or of an unknown type.
      StructureError: missing, extra or misshaped tensors.
      ConfigError: another architecture.
    """
    header = read_header(file)
    model = Llama(read_config(header, **options))
    tensors = GGUFTensors(header, model.config)
    params = to_ours(
        NAMES, registry.abstract(model), tensors, dtype=np.dtype(dtype), where=str(file)
    )
    return model, params, read_tokenizer(header)


def _write_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope.theta)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.kind))
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_length or 0)
    elif config.rope.kind == "llama3":
        plain = Rope(theta=config.rope.theta).inv_freq(config.head_dim)
        writer.add_tensor(FREQS, plain / config.rope.inv_freq(config.head_dim))
    elif config.rope.kind != "default":
        raise ConfigError(f"rope type {config.rope.kind!r} has no GGUF form")


def _stored(name: str, array: np.ndarray, kind: GGMLQuantizationType) -> tuple[np.ndarray, Any]:
    """The bytes of a tensor and their type; vectors stay in float32."""
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim < 2 or kind == GGMLQuantizationType.F32:
        return array, GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if array.shape[-1] % block:
        raise ConfigError(f"{name}: rows of {array.shape[-1]} do not divide into blocks of {block}")
    return gguf.quants.quantize(array, kind), kind


def save_gguf(
    file: str | Path,
    model: Llama,
    params: Any,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
    name: str = "flora_jax model",
) -> None:
    """A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model, written atomically.

    Args:
      dtype: of the matrices: ``float32, float16, bfloat16, q8_0, q4_0`` or ``q4_1``.

    Raises:
      ConfigError: an unknown dtype, or something that GGUF cannot say.
      StructureError: a leaf is no plain array.
    """
    if dtype not in STORED:
        raise ConfigError(unknown("GGUF dtype", dtype, STORED))
    for path, leaf in flatten(params, is_leaf=is_leaf).items():
        if isinstance(leaf, WeightLeaf):
            raise StructureError(
                f"{path} is a {type(leaf).__name__}; flora_jax.materialize() the parameters first"
            )
    config = model.config
    if config.sliding_layers is not None:
        raise ConfigError("GGUF has no windows that differ between layers")
    family = "llama" if config.family == "mistral" else config.family
    with atomic(file) as partial:
        writer = gguf.GGUFWriter(partial, family)
        writer.add_name(name)
        _write_config(writer, config)
        if tokenizer is not None:
            write_tokenizer(writer, tokenizer)
        tensors = Theirs(NAMES, params)
        for key in tensors:
            array = np.asarray(tensors[key], np.float32)
            heads = heads_of(key, config)
            array = array if heads is None else interleave(array, heads)
            data, kind = _stored(key, array, STORED[dtype])
            writer.add_tensor(key, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
