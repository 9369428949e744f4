"""Synthetic token sequences that probe what a sequence layer can remember."""

from __future__ import annotations

import dataclasses

import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data.generated import Generated
from flora_jax.data.packing import Batch

TASKS = ("copy", "recall", "induction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceTask(Generated):
    """Copying, associative recall and induction; batches are those of a language model.

    Token 0 is the separator; symbols are 1 ... vocab - 1. Only answers have loss.
      - ``copy``: ``s_1 ... s_n 0 s_1 ... s_n``.
      - ``recall``: n key-value pairs with different keys, 0, then the n keys in another order,
        each followed by its value (multi-query associative recall, arXiv 2312.04927). Keys are
        below vocab // 2, values are not: a key is never mistaken for a value.
      - ``induction``: n symbols among which x occurs once and is followed by y, then x again; the
        answer is y (arXiv 2209.11895).

    Example:
        >>> task = SequenceTask(task="copy", length=3, vocab=8)
        >>> batch = next(iter(task.train(batch_size=2)))
        >>> batch["tokens"].shape, batch["loss_mask"][0].tolist()
        ((2, 6), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])

    Attributes:
        task: one of the three.
        length: n.
        vocab: number of tokens, the separator included.
        eval_size: sequences of the evaluation.
        task_seed: of the evaluation.
    """

    task: str = "recall"
    length: int = 16
    vocab: int = 64
    eval_size: int = 256
    task_seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(unknown("task", self.task, TASKS))
        if self.length < 2:
            raise ConfigError(f"length must be at least 2, got {self.length}")
        need = {"copy": 2, "recall": 2 * self.length + 2, "induction": 3}[self.task]
        if self.vocab < need:
            raise ConfigError(f"vocab={self.vocab}: {self.task} of {self.length} needs {need}")

    @property
    def source(self) -> str:
        """What the sequences are, for people."""
        return f"{self.task} of {self.length}"

    @property
    def seq_len(self) -> int:
        """T of the batches."""
        n = self.length
        return {"copy": 2 * n, "recall": 4 * n, "induction": n + 1}[self.task]

    def _sample(self, rng: np.random.Generator, count: int) -> Batch:
        sequence, answer = getattr(self, f"_{self.task}")(rng, count)
        tokens = sequence[:, :-1].astype(np.int32)
        return {
            "tokens": tokens,
            "targets": sequence[:, 1:].astype(np.int32),
            "loss_mask": np.broadcast_to(answer[1:], tokens.shape).astype(np.float32),
            "positions": np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), tokens.shape),
            "segment_ids": np.ones_like(tokens),
        }

    def _copy(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.length
        symbols = rng.integers(1, self.vocab, (count, n))
        sequence = np.concatenate([symbols, np.zeros((count, 1), int), symbols], axis=1)
        return sequence, np.arange(2 * n + 1) > n

    def _recall(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        n, half = self.length, self.vocab // 2
        every = np.broadcast_to(np.arange(1, half), (count, half - 1))
        keys = rng.permuted(every, axis=1)[:, :n]
        values = rng.integers(half, self.vocab, (count, n))
        order = rng.permuted(np.broadcast_to(np.arange(n), (count, n)), axis=1)
        pairs = np.stack([keys, values], axis=-1)
        asked = np.take_along_axis(pairs, order[..., None], axis=1)
        flat = (pairs.reshape(count, -1), np.zeros((count, 1), int), asked.reshape(count, -1))
        at = np.arange(4 * n + 1)
        return np.concatenate(flat, axis=1), (at > 2 * n) & (at % 2 == 0)

    def _induction(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        n, row = self.length, np.arange(count)
        x = rng.integers(1, self.vocab, count)
        body = rng.integers(1, self.vocab - 1, (count, n))
        body += body >= x[:, None]  # Skips x.
        at = rng.integers(0, n - 1, count)
        body[row, at] = x
        y = body[row, at + 1]
        return np.concatenate([body, x[:, None], y[:, None]], axis=1), np.arange(n + 2) == n + 1
