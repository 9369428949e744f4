"""Images that a language model is to name: the image is features, not tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError
from flora_jax.data import pipeline
from flora_jax.data.encoding import Tokenizer
from flora_jax.data.images import ImageData
from flora_jax.data.packing import Batch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNames:
    """``prompt`` is to be continued by the name of an image's class.

    Batches are those of a language model (``tokens, targets, loss_mask`` [B, T], the loss on the
    name and the end of the text) and ``example`` float32 [B, P, patch * patch * C]: the image's
    patches, row by row, for methods that generate weights from them.

    Attributes:
        images: the images.
        prompt: the same for every image.
        names: of the classes, in the order of the labels.
        patch: side of a square patch.
    """

    images: ImageData
    prompt: str = "digit is:"
    names: tuple[str, ...] = DIGITS
    patch: int = 2

    def __post_init__(self) -> None:
        if len(self.names) < self.images.num_classes:
            raise ConfigError(
                f"names={self.names} are {len(self.names)}, the images have "
                f"{self.images.num_classes} classes"
            )

    @property
    def source(self) -> str:
        """Where the images come from."""
        return self.images.source

    def train(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Shuffled batches, as ``ImageData`` makes them."""
        make = functools.partial(self._batch, self._sentences(tokenizer))
        return self.images.train(None, batch_size, seed=seed, shard=shard).map(make)

    def evaluation(
        self,
        tokenizer: Tokenizer,
        batch_size: int = 256,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """Every test image once; rows that fill the last batch have no loss."""
        make = functools.partial(self._batch, self._sentences(tokenizer))
        return self.images.evaluation(None, batch_size, max_batches, shard).map(make)

    def _sentences(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Ids [classes, T + 1] of all sentences, ended and filled with eos, and what has loss."""
        prompt = list(tokenizer.encode(self.prompt))
        rows = [[*prompt, *tokenizer.encode(f" {n}"), tokenizer.eos_id] for n in self.names]
        ids = np.full((len(rows), max(map(len, rows))), tokenizer.eos_id, np.int32)
        asked = np.zeros(ids.shape, np.float32)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = row
            asked[k, len(prompt) : len(row)] = 1
        return ids, asked

    def _batch(self, sentences: tuple[np.ndarray, np.ndarray], batch: Any) -> Batch:
        ids, asked = (table[batch["label"]] for table in sentences)
        return {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "loss_mask": asked[:, 1:] * batch["weight"][:, None],
            "example": self._patches(batch["image"]),
        }

    def _patches(self, images: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        p = self.patch
        if height % p or width % p:
            raise ConfigError(f"patch={p} does not divide images of {height}x{width}")
        cut = images.reshape(count, height // p, p, width // p, p, channels)
        return cut.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, p * p * channels)
