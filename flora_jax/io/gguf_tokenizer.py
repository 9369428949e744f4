"""The byte-level BPE tokenizer inside a GGUF file, both ways."""

from __future__ import annotations

import json
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from flora_jax.core.errors import ConfigError, FormatError, unknown
from flora_jax.io.gguf_header import Header
from flora_jax.io.tokenizer import SMOLLM_SYSTEM, Tokenizer, default_system

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",
}
"""Word-splitting expressions of the pre-tokenizers that have their own."""


def _pre_tokenizers() -> dict[str, Any]:
    """GGUF's name of a pre-tokenizer and what it does before the byte pairs are merged."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    table: dict[str, Any] = {"gpt-2": words, "default": words}
    table["smollm"] = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), words]
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, expression in SPLITS.items():
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        table[name] = pre_tokenizers.Sequence([split, whole])
    return table


def read_tokenizer(header: Header) -> Tokenizer | None:
    """The tokenizer of a GGUF file, ``None`` if it has none.

    Raises:
      FormatError: tokens and types of different length, a merge of unknown tokens.
      ConfigError: not byte-level BPE, or a pre-tokenizer that is not known.
    """
    fields = header.fields
    if "tokenizer.ggml.model" not in fields:
        return None
    kind = header.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(f"{header.path}: tokenizer {kind!r}; known: 'gpt2' (byte-level BPE)")
    table = _pre_tokenizers()
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in table:
        raise ConfigError(f"{header.path}: {unknown('pre-tokenizer', pre, table)}")
    tokens = header.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in header.need("tokenizer.ggml.merges")]
    types = fields.get("tokenizer.ggml.token_type", np.full(len(tokens), NORMAL))
    if len(types) != len(tokens):
        raise FormatError(f"{header.path}: {len(tokens)} tokens, but {len(types)} token types")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Backend(models.BPE(vocabulary, merges))
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise FormatError(f"{header.path}: the tokenizer's merges do not fit: {error}") from None
    backend.pre_tokenizer = table[pre]
    backend.decoder = decoders.ByteLevel()
    specials = [tokens[i] for i in np.flatnonzero(np.asarray(types) == CONTROL)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    added = [tokens[i] for i in np.flatnonzero(np.asarray(types) == USER_DEFINED)]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return Tokenizer(
        backend,
        bos_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_id=fields.get("tokenizer.ggml.padding_token_id"),
        system=default_system(fields.get("tokenizer.chat_template", "")),
    )


def _pre_name(serialised: dict[str, Any] | None) -> str:
    """GGUF's name of a serialised pre-tokenizer; offsets do not matter, they change no id."""

    def bare(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: bare(v) for k, v in node.items() if k != "trim_offsets"}
        return [bare(v) for v in node] if isinstance(node, list) else node

    for name, known in _pre_tokenizers().items():
        probe = Backend(models.BPE())
        probe.pre_tokenizer = known
        if bare(json.loads(probe.to_str())["pre_tokenizer"]) == bare(serialised):
            return name
    raise ConfigError("GGUF has no name for this tokenizer's pre-tokenizer")


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Put a byte-level BPE tokenizer into a GGUF file.

    Raises:
      ConfigError: another kind of tokenizer, or a pre-tokenizer without a GGUF name.
    """
    data = json.loads(tokenizer.backend.to_str())
    if data["model"]["type"] != "BPE":
        raise ConfigError(f"GGUF: only a BPE tokenizer can be written, not {data['model']['type']}")
    pre = _pre_name(data["pre_tokenizer"])
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[t] for t in tokens] != list(range(len(tokens))):
        raise ConfigError("GGUF: the tokenizer's ids have gaps")
    added = {token["content"]: token["special"] for token in data["added_tokens"]}
    kinds = {None: NORMAL, True: CONTROL, False: USER_DEFINED}
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(t)] for t in tokens])
    writer.add_token_merges(merges)
    for put, value in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
    ):
        if value is not None:
            put(value)
    writer.add_add_bos_token(False)
    if tokenizer.system == SMOLLM_SYSTEM:
        writer.add_chat_template(_chatml(SMOLLM_SYSTEM))


def _chatml(system: str) -> str:
    """The Jinja template of what :meth:`Tokenizer.apply_chat` does."""
    first = f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ '" + first + "' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
