"""Labelled texts: rows, pairs, labels, sources."""

import itertools
import json

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data import ClassificationData, Fields


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    lines = [{"text": f"t{k}" * (k % 7 + 1), "label": "pos" if k % 3 else "neg"} for k in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_rows_and_totals(reviews, tokenizer):
    data = ClassificationData(source=reviews, seq_len=24, split_fraction=0.25)
    assert data.class_names == ("neg", "pos") and data.num_classes == 2
    batch = next(iter(data.train(tokenizer, 5)))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((5, 24), np.int32),
        "mask": ((5, 24), np.int32),
        "token_types": ((5, 24), np.int32),
        "label": ((5,), np.int32),
        "weight": ((5,), np.float32),
    }
    for tokens, mask, label in zip(batch["tokens"], batch["mask"], batch["label"]):
        row = tokens[: mask.sum()].tolist()
        assert row[0] == 257 and row[-1] == 256 and (tokens[mask.sum() :] == 0).all()
        number = int(tokenizer.decode(row[1:-1]).split("t")[1])
        assert label == (1 if number % 3 else 0)
    for size in (3, 4, 16):
        assert sum(b["weight"].sum() for b in data.evaluation(tokenizer, size)) == 10
    whole = list(itertools.islice(data.train(tokenizer, 4, 2), 20))
    iterator = iter(data.train(tokenizer, 4, 2))
    for _ in range(7):
        next(iterator)
    resumed = iter(data.train(tokenizer, 4, 2))
    resumed.set_state(iterator.get_state())
    assert all(np.array_equal(next(resumed)["tokens"], b["tokens"]) for b in whole[7:])


def test_pairs_and_longest_first_truncation(tmp_path, tokenizer):
    path = tmp_path / "pairs.tsv"
    path.write_text("text\ttext_pair\tlabel\nabcdefgh\tuvw\t2\nab\tstuvwxyz\t10\nab\tuv\t2\n")
    data = ClassificationData(source=str(path), eval_source=str(path), seq_len=10)
    assert data.class_names == ("2", "10"), "numbers sort as numbers"
    rows = list(data.evaluation(tokenizer, 1))

    def shown(batch):
        n = batch["mask"].sum()
        names = {256: "|", 257: "^"}
        text = "".join(names.get(t, chr(t)) for t in batch["tokens"][0, :n].tolist())
        return text, "".join(map(str, batch["token_types"][0, :n].tolist()))

    assert shown(rows[0]) == ("^abcd|uvw|", "0000001111")
    assert shown(rows[1]) == ("^ab|stuvw|", "0000111111")
    assert shown(rows[2]) == ("^ab|uv|", "0000111")
    assert [int(b["label"][0]) for b in rows] == [0, 1, 0]
    dropped = ClassificationData(
        source=str(path), eval_source=str(path), seq_len=10, too_long="drop"
    )
    assert len(dropped.evaluation(tokenizer, 1)) == 1
    with pytest.raises(FormatError, match=r"pairs.tsv:2: 11 tokens exceed the room for 7"):
        ClassificationData(
            source=str(path), eval_source=str(path), seq_len=10, too_long="error"
        ).train(tokenizer, 1)


def test_fields_labels_and_errors(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"s": "a", "y": 1}\n{"s": "b", "y": 0}\n{"s": "c", "y": 1}\n')
    data = ClassificationData(source=str(path), fields=Fields(text="s", label="y"))
    assert data.class_names == ("0", "1")
    swapped = ClassificationData(
        source=str(path),
        eval_source=str(path),
        fields=Fields(text="s", label="y"),
        labels=("1", "0"),
    )
    labels = np.concatenate([b["label"] for b in swapped.evaluation(tokenizer, 1)])
    assert labels.tolist() == [0, 1, 0]
    with pytest.raises(FormatError, match=r"x\.jsonl:2: label '0' is not one of 1, 7"):
        ClassificationData(
            source=str(path),
            eval_source=str(path),
            fields=Fields(text="s", label="y"),
            labels=("1", "7"),
        ).train(tokenizer, 1)
    with pytest.raises(FormatError, match=r"x\.jsonl:1: field 'label' is missing"):
        ClassificationData(source=str(path), split_fraction=0).num_classes  # noqa: B018
    with pytest.raises(ConfigError, match="too_long must be"):
        ClassificationData(source=str(path), too_long="split")
    path.write_text('{"text": "a", "label": [1]}\n{"text": "a", "label": [1]}\n')
    with pytest.raises(FormatError, match=r"x\.jsonl:1: field 'label' must be text or an integer"):
        ClassificationData(source=str(path), split_fraction=0).num_classes  # noqa: B018


def test_vader_ground_truth(tmp_path, tokenizer):
    path = tmp_path / "tweets_GroundTruth.txt"
    path.write_bytes("1\t2.5\tgood\n2\t-0.1\tso so\n3\t-1.5\tbad \xe9\n".encode("latin-1"))
    data = ClassificationData(source=str(path), eval_source=str(path), seq_len=16)
    assert data.class_names == ("negative", "positive")
    batches = list(data.evaluation(tokenizer, 1))
    assert [int(b["label"][0]) for b in batches] == [1, 0]
    path.write_text("1 2.5 good\n")
    with pytest.raises(FormatError, match=r"GroundTruth.txt:1: expected id, score and text"):
        ClassificationData(source=str(path)).num_classes  # noqa: B018


def test_missing_set_says_what_to_install(monkeypatch, tmp_path):
    import flora_jax.data.classification as module

    def missing(fields):
        raise FileNotFoundError(tmp_path / "games")

    monkeypatch.setitem(module.LABELLED, "fortunes", ("fortunes", missing))
    with pytest.raises(ConfigError, match="'fortunes' is not installed.*apt-get install fortunes"):
        ClassificationData(source="fortunes").num_classes  # noqa: B018
