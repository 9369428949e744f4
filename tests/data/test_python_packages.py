"""The labelled set that every Python carries."""

from flora_jax.data import ClassificationData


class Bytes:
    bos_id, eos_id = 256, 257

    def encode(self, text):
        return list(text.encode())


def test_eight_packages_with_a_hundred_texts_each():
    data = ClassificationData(source="python-packages", seq_len=32)
    assert data.class_names == (
        "asyncio", "email", "http", "importlib", "logging", "unittest", "urllib", "xml"
    )  # fmt: skip
    labels = [b["label"] for b in data.evaluation(Bytes(), 64)]
    assert sum(map(len, labels)) > 300
    batch = next(iter(data.train(Bytes(), 16)))
    assert batch["tokens"].shape == (16, 32) and batch["label"].max() < 8
