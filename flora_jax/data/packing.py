"""From tokenised documents to rows of fixed length.

A row holds *pieces* of documents. Inside a row, piece s has segment id s = 1, 2, ... and positions
that restart at 0; 0 is the segment of padding. The target of a token is the next token of its own
document, so no target crosses a segment; the last token of a document (its eos) has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flora_jax.core.errors import ConfigError, FormatError, unknown

PACKINGS = ("concat", "first_fit", "none")
TOO_LONG = ("split", "truncate", "drop", "error")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Documents end to end: ``tokens[offsets[d]:offsets[d + 1]]`` is document d.

    Attributes:
        tokens: int32 [N].
        trainable: bool [N], false for the tokens of a prompt.
        offsets: int64 [D + 1].
        names: where each document came from, for messages.
    """

    tokens: np.ndarray
    trainable: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...] = ()

    @classmethod
    def join(cls, documents: Sequence[tuple[np.ndarray, np.ndarray]], names=()) -> Tokenised:
        """Puts ``(tokens, trainable)`` documents end to end."""
        lengths = [len(tokens) for tokens, _ in documents]
        return cls(
            tokens=np.concatenate([np.zeros(0, np.int32), *(t for t, _ in documents)]),
            trainable=np.concatenate([np.zeros(0, bool), *(m for _, m in documents)]),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            names=tuple(names),
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which piece of which document goes into which row.

    Piece p is ``document[start[p] : start[p] + length[p]]``; row r has the pieces
    ``first[r] : first[r + 1]``, in order.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


def shifted(tokens: np.ndarray, trainable: np.ndarray) -> Batch:
    """Tokens, next-token targets and loss mask of one document, each of shape [n].

    ``loss_mask[i]`` says whether ``targets[i] = tokens[i + 1]`` is trained on.
    """
    targets, mask = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    targets[:-1], mask[:-1] = tokens[1:], trainable[1:]
    return {"tokens": np.asarray(tokens, np.int32), "targets": targets, "loss_mask": mask}


def plan_rows(
    lengths: np.ndarray,
    seq_len: int,
    packing: str = "concat",
    too_long: str = "split",
    names: Sequence[str] = (),
) -> Plan:
    """Assigns documents of the given lengths to rows of ``seq_len`` tokens.

    Args:
        lengths: int [D].
        seq_len: T, the tokens of a row.
        packing: ``concat`` cuts the stream of all documents every T tokens (no padding but at the
            very end); ``first_fit`` puts whole pieces into the first open row with room;
            ``none`` gives each piece a row of its own.
        too_long: what happens to a document of more than T tokens: ``split`` into pieces,
            ``truncate`` to the first T tokens, ``drop``, or ``error``.
        names: names of the documents, for the error.

    Returns:
        The plan; ``split`` keeps every token exactly once.

    Raises:
        ConfigError: unknown packing or policy, or ``seq_len`` below 1.
        FormatError: a document is too long and the policy is ``error``.
    """
    check_choices(seq_len, packing, too_long)
    lengths = np.asarray(lengths, np.int64)
    over = np.flatnonzero(lengths > seq_len)
    if too_long == "error" and len(over):
        d = int(over[0])
        name = names[d] if len(names) else f"document {d}"
        raise FormatError(
            f"{name}: {lengths[d]} tokens exceed seq_len={seq_len}; raise it or set too_long to"
            " split, truncate or drop"
        )
    if too_long == "truncate":
        lengths = np.minimum(lengths, seq_len)
    elif too_long == "drop":
        lengths = np.where(lengths > seq_len, 0, lengths)
    if packing == "concat":
        return _concat(lengths, seq_len)
    document, start, length = chunks(lengths, seq_len)
    row = np.arange(len(length)) if packing == "none" else _first_fit(length, seq_len)
    order = np.argsort(row, kind="stable")
    return _plan(document[order], start[order], length[order], row[order])


def check_choices(seq_len: int, packing: str, too_long: str) -> None:
    """Raises ConfigError unless the three are valid."""
    if packing not in PACKINGS:
        raise ConfigError(unknown("packing", packing, PACKINGS))
    if too_long not in TOO_LONG:
        raise ConfigError(unknown("too_long", too_long, TOO_LONG))
    if seq_len < 1:
        raise ConfigError(f"seq_len must be at least 1, got {seq_len}")


def _plan(document: np.ndarray, start: np.ndarray, length: np.ndarray, row: np.ndarray) -> Plan:
    rows = int(row[-1]) + 1 if len(row) else 0
    first = np.searchsorted(row, np.arange(rows + 1))
    return Plan(document=document, start=start, length=length, first=first)


def _concat(lengths: np.ndarray, seq_len: int) -> Plan:
    # Truncated or dropped documents have a shorter place in the stream than in storage, which is
    # why pieces are given relative to their document.
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.union1d(offsets, np.arange(0, offsets[-1], seq_len))
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(offsets, begin, "right") - 1
    return _plan(document, begin - offsets[document], end - begin, begin // seq_len)


def chunks(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length of the pieces of at most ``seq_len`` tokens, in order."""
    count = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), count)
    k = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = k * seq_len
    return document, start, np.minimum(lengths[document] - start, seq_len)


def _first_fit(lengths: np.ndarray, seq_len: int, open_rows: int = 512) -> np.ndarray:
    """Row of each piece; at most ``open_rows`` rows are searched, so the cost stays linear."""
    room = np.zeros(open_rows, np.int64)
    row_of = np.zeros(open_rows, np.int64)
    rows, n = np.empty(len(lengths), np.int64), 0
    for k, length in enumerate(lengths):
        slot = int(np.argmax(room >= length))
        if room[slot] < length:
            # A new row takes the place of the fullest one, which is closed.
            slot = int(np.argmin(room))
            room[slot], row_of[slot], n = seq_len, n, n + 1
        room[slot] -= length
        rows[k] = row_of[slot]
    return rows


def assemble(corpus: Tokenised, plan: Plan, row: int, seq_len: int) -> Batch:
    """Row ``row`` of a plan: the five arrays of a language-model batch, each of shape [T]."""
    out = empty_row(seq_len)
    at = 0
    for s, p in enumerate(range(plan.first[row], plan.first[row + 1]), start=1):
        begin = corpus.offsets[plan.document[p]] + plan.start[p]
        n = int(plan.length[p])
        # One token more, so that a piece cut by a row still predicts its successor.
        end = min(begin + n + 1, corpus.offsets[plan.document[p] + 1])
        piece = shifted(corpus.tokens[begin:end], corpus.trainable[begin:end])
        for name, value in piece.items():
            out[name][at : at + n] = value[:n]
        out["positions"][at : at + n] = np.arange(n)
        out["segment_ids"][at : at + n] = s
        at += n
    return out


def empty_row(seq_len: int) -> Batch:
    """A row of padding: all zeros, weight zero."""
    kinds = {"tokens": "i4", "targets": "i4", "loss_mask": "f4", "positions": "i4"}
    return {name: np.zeros(seq_len, kind) for name, kind in (kinds | {"segment_ids": "i4"}).items()}
