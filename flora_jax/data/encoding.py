"""From documents to tokens: chat templates, prompts without loss, bos and eos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data.documents import Document, Source
from flora_jax.data.packing import Tokenised


class Tokenizer(Protocol):
    """What the pipelines ask of a tokenizer.

    ``encode`` adds no special tokens. Two more attributes are used where asked for: ``bos_id``,
    and ``apply_chat(messages)``, which renders a chat to a string or to ``(text, trainable)``
    pieces.
    """

    eos_id: int

    def encode(self, text: str) -> Sequence[int]: ...


def render(document: Document, tokenizer: Any, where: str) -> Iterable[tuple[str, bool]]:
    """The ``(text, trainable)`` pieces of a document; chats go through the tokenizer's template.

    If ``apply_chat`` gives one string, the part that each assistant message adds to what came
    before is the trainable one, and the template must only ever append.
    """
    if not document.messages:
        return document.pieces
    if not hasattr(tokenizer, "apply_chat"):
        raise ConfigError(f"{where}: chat messages need a tokenizer with apply_chat")
    messages = [dict(m) for m in document.messages]
    text = tokenizer.apply_chat(messages)
    if not isinstance(text, str):
        return text
    pieces, before = [], ""
    for k, message in enumerate(messages):
        after = text if k + 1 == len(messages) else tokenizer.apply_chat(messages[: k + 1])
        if not after.startswith(before):
            raise FormatError(f"{where}: the chat template rewrites earlier messages (message {k})")
        pieces.append((after[len(before) :], message["role"] == "assistant"))
        before = after
    return pieces


def encode_document(
    document: Document,
    where: str,
    *,
    tokenizer: Tokenizer,
    completion_only: bool = True,
    add_bos: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a document and which of them are trained on.

    Pieces are encoded one by one, as at inference, where a prompt is encoded without its answer.

    Args:
        document: the text or chat.
        where: its name, for messages.
        tokenizer: see ``Tokenizer``.
        completion_only: prompts are not trained on.
        add_bos: begin with ``tokenizer.bos_id``.

    Returns:
        tokens int32 [n] ending with eos, and trainable bool [n]; n = 0 if there is no text.
    """
    tokens: list[int] = []
    trainable: list[bool] = []
    for text, train in render(document, tokenizer, where):
        ids = tokenizer.encode(text)
        tokens += ids
        trainable += [train or not completion_only] * len(ids)
    if not tokens:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    if add_bos:
        if getattr(tokenizer, "bos_id", None) is None:
            raise ConfigError("add_bos=True, but the tokenizer has no bos_id")
        tokens.insert(0, tokenizer.bos_id)
        trainable.insert(0, False)
    if tokens[-1] != tokenizer.eos_id:  # A chat template may have ended the text already.
        tokens.append(tokenizer.eos_id)
        trainable.append(trainable[-1])
    return np.asarray(tokens, np.int32), np.asarray(trainable, bool)


def tokenise(source: Source, encode: Any, limit: int | None = None) -> Tokenised:
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
