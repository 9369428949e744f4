"""From documents to tokens: chat templates, prompts without loss, bos and eos."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data.documents import Document, Source
from flora_jax.data.packing import Tokenised


class Tokenizer(Protocol):
    """What the pipelines ask of a tokenizer.

    ``encode`` adds no special tokens. Two more attributes are used where asked for: ``bos_id``,
    and ``apply_chat(messages, add_generation_prompt=...)``, which renders a chat to ids, to a
    string, or to ``(text, trainable)`` pieces.
    """

    eos_id: int

    def encode(self, text: str) -> Sequence[int]: ...


def encode_pieces(
    pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids and trainable flags; pieces are encoded apart, as a prompt is at inference."""
    tokens: list[int] = []
    trainable: list[bool] = []
    for text, train in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        trainable += [train] * len(ids)
    return tokens, trainable


def encode_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str
) -> tuple[list[int], list[bool]]:
    """Ids of a chat, trainable where the assistant speaks.

    Unless the template marks its pieces itself, the assistant's part is what its message adds to
    the prompt for it (``messages[:k]`` with the generation prompt).

    Raises:
        ConfigError: the tokenizer has no chat template.
        FormatError: the template renders earlier messages otherwise when more follow.
    """
    if not hasattr(tokenizer, "apply_chat"):
        raise ConfigError(f"{where}: chat messages need a tokenizer with apply_chat")
    messages = [dict(m) for m in messages]

    def ids(count: int, prompt: bool) -> list[int]:
        out = tokenizer.apply_chat(messages[:count], add_generation_prompt=prompt)
        return list(tokenizer.encode(out) if isinstance(out, str) else out)

    whole = ids(len(messages), False)
    if whole and isinstance(whole[0], tuple):
        return encode_pieces(whole, tokenizer)
    trainable = [False] * len(whole)
    for k in (k for k, m in enumerate(messages) if m["role"] == "assistant"):
        prompt, answered = ids(k, True) if k else [], ids(k + 1, False)
        if whole[: len(answered)] != answered:
            raise FormatError(f"{where}: the chat template rewrites earlier messages (message {k})")
        # Not len(prompt): its last token may merge with the beginning of the answer.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, answered))
        begin = sum(1 for _ in same)
        trainable[begin : len(answered)] = [True] * (len(answered) - begin)
    return whole, trainable


def encode_document(
    document: Document,
    where: str,
    *,
    tokenizer: Tokenizer,
    completion_only: bool = True,
    add_bos: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a document and which of them are trained on.

    Args:
        document: the text or chat.
        where: its name, for messages.
        tokenizer: see ``Tokenizer``.
        completion_only: prompts are not trained on.
        add_bos: begin with ``tokenizer.bos_id``.

    Returns:
        tokens int32 [n] ending with eos (a chat: as its template ends) and trainable bool [n];
        n = 0 if there is no text.
    """
    if document.messages:
        tokens, trainable = encode_chat(document.messages, tokenizer, where)
    else:
        tokens, trainable = encode_pieces(document.pieces, tokenizer)
    if not tokens:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    if add_bos:
        if getattr(tokenizer, "bos_id", None) is None:
            raise ConfigError("add_bos=True, but the tokenizer has no bos_id")
        tokens.insert(0, tokenizer.bos_id)
        trainable.insert(0, False)
    if not (document.messages and tokenizer.eos_id in tokens):  # Templates end turns with eos.
        tokens.append(tokenizer.eos_id)
        trainable.append(trainable[-1])
    mask = np.asarray(trainable, bool) | (not completion_only)
    return np.asarray(tokens, np.int32), mask


def tokenise(
    source: Source,
    encode: Callable[[Document, str], tuple[np.ndarray, np.ndarray]],
    limit: int | None = None,
) -> Tokenised:
    """All documents of a source, or as many as give ``limit`` tokens; empty ones are left out.

    ``encode(document, name)`` gives tokens and trainable, as ``encode_document`` does.
    """
    encoded, names, total = [], [], 0
    for k in range(len(source)):
        if limit is not None and total >= limit:
            break
        tokens, trainable = encode(source[k], source.name(k))
        if len(tokens):
            encoded.append((tokens, trainable))
            names.append(source.name(k))
            total += len(tokens)
    return Tokenised.join(encoded, names)
