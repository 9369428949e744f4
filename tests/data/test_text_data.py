"""Text pipelines: batches, resumption, sharding, evaluation totals, chats and prompts."""

import dataclasses
import json

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data import TextData

SCHEMA = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 90, 50)]
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    return write_jsonl(path, [{"text": text} for text in texts])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("packing", ["concat", "first_fit", "none"])
def test_schema_and_bit_exact_resume(corpus, tokenizer, packing, lazy):
    data = TextData(source=corpus, seq_len=32, packing=packing, lazy=lazy)
    whole = take(iter(data.train(tokenizer, 4, seed=3)), 40)  # More than one epoch.
    for batch in whole:
        assert {k: v.dtype.type for k, v in batch.items()} == SCHEMA
        assert all(v.shape == (4, 32) for v in batch.values())
    for stop in (0, 5, 23):
        first = iter(data.train(tokenizer, 4, seed=3))
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        resumed = iter(data.train(tokenizer, 4, seed=3))
        resumed.set_state(state)
        rest = take(resumed, 40 - stop)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest))
    other = take(iter(data.train(tokenizer, 4, seed=4)), 2)
    assert not all(same(a, b) for a, b in zip(whole, other))


def test_prefetch_threads_change_nothing(corpus, tokenizer):
    data = TextData(source=corpus, seq_len=32)
    threaded = TextData(source=corpus, seq_len=32, prefetch=2)
    plain = take(iter(data.train(tokenizer, 4)), 12)
    iterator = iter(threaded.train(tokenizer, 4))
    head = take(iterator, 5)
    state = iterator.get_state()
    resumed = iter(threaded.train(tokenizer, 4))
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(plain, head + take(resumed, 7)))


@pytest.mark.parametrize("packing", ["concat", "first_fit", "none"])
def test_lazy_rows_hold_the_same_tokens(corpus, tokenizer, packing):
    """One epoch of the lazy pipeline: segments are contiguous pieces, targets and masks fit."""
    eager = TextData(source=corpus, seq_len=32, packing=packing, epochs=1, split_fraction=0)
    lazy = dataclasses.replace(eager, lazy=True)
    counts = []
    for data in (eager, lazy):
        batches = list(data.train(tokenizer, 1))
        rows = [{k: v[0] for k, v in b.items()} for b in batches]
        for row in rows:
            for s in range(1, row["segment_ids"].max() + 1):
                where = np.flatnonzero(row["segment_ids"] == s)
                np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
                inside = where[:-1]
                np.testing.assert_array_equal(row["targets"][inside], row["tokens"][inside + 1])
                assert (row["loss_mask"][inside] == 1).all()
                if row["tokens"][where[-1]] == tokenizer.eos_id:
                    assert row["loss_mask"][where[-1]] == 0
        real = np.concatenate([r["tokens"][r["segment_ids"] > 0] for r in rows])
        counts.append((np.bincount(real).tolist(), sum(r["loss_mask"].sum() for r in rows)))
    assert counts[0] == counts[1]


def test_shards_make_up_the_global_batch(corpus, tokenizer):
    data = TextData(source=corpus, seq_len=32)
    whole = take(iter(data.train(tokenizer, 6, seed=1)), 12)
    parts = [take(iter(data.train(tokenizer, 6, seed=1, shard=(i, 3))), 12) for i in range(3)]
    for k, batch in enumerate(whole):
        for i in range(3):
            assert same({n: x[i::3] for n, x in batch.items()}, parts[i][k])
    with pytest.raises(ConfigError, match="multiple of 4 shards"):
        data.train(tokenizer, 6, shard=(0, 4))
    with pytest.raises(ConfigError, match="shard must be"):
        data.train(tokenizer, 6, shard=(2, 2))


def test_epochs_see_each_row_once_in_a_new_order(corpus, tokenizer):
    data = TextData(source=corpus, seq_len=32, epochs=2)
    rows = sum((list(b["tokens"]) for b in data.train(tokenizer, 1)), [])
    n = len(rows) // 2
    keys = [row.tobytes() for row in rows]
    assert sorted(keys[:n]) == sorted(keys[n:]) and keys[:n] != keys[n:]
    dropped = list(data.train(tokenizer, 5))
    assert len(dropped) == 2 * n // 5
    following = [b["tokens"].tobytes() for b in data.train(tokenizer, 1, seed=1)]
    assert following[:n] != keys[n:], "seed 1 must not replay the second epoch of seed 0"


def test_evaluation_counts_everything_once(corpus, tokenizer):
    data = TextData(source=corpus, seq_len=32, split_fraction=0.3)
    held = data.documents("held-out")
    wanted = sum(len(held[i].pieces[0][0].encode()) for i in range(len(held)))
    for batch_size in (1, 4, 7, 100):
        batches = data.evaluation(tokenizer, batch_size)
        assert len(batches) == len(list(batches))
        assert all(b["tokens"].shape == (batch_size, 32) for b in batches)
        # n bytes and eos: n targets.
        assert sum(b["loss_mask"].sum() for b in batches) == wanted
        assert sum(b["loss_mask"].sum() for b in batches) == wanted, "iterates again"
    shards = [list(data.evaluation(tokenizer, 8, shard=(i, 2))) for i in range(2)]
    assert len(shards[0]) == len(shards[1])
    assert sum(b["loss_mask"].sum() for part in shards for b in part) == wanted
    assert len(data.evaluation(tokenizer, 2, max_batches=3)) == 3


def test_split_is_disjoint_complete_and_stable(corpus):
    data = TextData(source=corpus, split_fraction=0.2)
    parts = [data.documents(p) for p in ("train", "held-out")]
    names = [{p.name(i) for i in range(len(p))} for p in parts]
    assert (len(names[0]), len(names[1])) == (40, 10) and not names[0] & names[1]
    again = TextData(source=corpus, split_fraction=0.2).documents("held-out")
    assert {again.name(i) for i in range(10)} == names[1]
    other = TextData(source=corpus, split_fraction=0.2, split_seed=1).documents("held-out")
    assert {other.name(i) for i in range(10)} != names[1]


def test_lazy_evaluation_stops_reading(corpus, tokenizer):
    data = TextData(source=corpus, seq_len=8, lazy=True, split_fraction=0.5)
    full = list(data.evaluation(tokenizer, 2))
    short = list(data.evaluation(tokenizer, 2, max_batches=3))
    assert len(short) == 3 and all(same(a, b) for a, b in zip(full, short))
    read = next(v[1] for k, v in data._cache.items() if k[2] is not None)
    assert len(read.tokens) < 3 * 2 * 8 + 100


def test_one_document_gives_its_tail(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("word " * 100)
    data = TextData(source=str(tmp_path / "book.txt"), split_fraction=0.2)
    head, tail = (data.documents(p)[0].pieces[0][0] for p in ("train", "held-out"))
    assert head + tail == "word " * 100 and 90 <= len(tail) <= 100


def test_prompts_have_no_loss(tmp_path, tokenizer):
    records = [{"prompt": f"Q{k}?", "completion": f" answer {k}"} for k in range(4)]
    path = write_jsonl(tmp_path / "qa.jsonl", records)
    data = TextData(
        source=path, seq_len=24, packing="none", epochs=1, shuffle=False, split_fraction=0
    )
    for k, batch in enumerate(data.train(tokenizer, 1)):
        trained = batch["targets"][0][batch["loss_mask"][0] > 0].tolist()
        assert trained == [*f" answer {k}".encode(), 256]
    everything = dataclasses.replace(data, completion_only=False)
    batch = next(iter(everything.train(tokenizer, 1)))
    assert batch["loss_mask"].sum() == len("Q0? answer 0")


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Adieu"},
]


def test_chats_train_on_the_assistant(tmp_path, chat_tokenizer, string_chat_tokenizer):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    data = TextData(source=path, eval_source=path, seq_len=80, packing="none")
    batch = next(iter(data.train(chat_tokenizer, 1)))
    trained = batch["targets"][batch["loss_mask"] > 0].tolist()
    assert trained == [*b"HelloAdieu", 256]
    batch = next(iter(data.train(string_chat_tokenizer, 1)))
    trained = batch["targets"][batch["loss_mask"] > 0].tolist()
    assert trained == [*b"HelloAdieu", 256]


def test_chats_that_end_with_the_user_or_lack_a_template(tmp_path, tokenizer, chat_tokenizer):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT[:3]}])
    data = TextData(source=path, eval_source=path, seq_len=80, packing="none")
    batch = next(iter(data.train(chat_tokenizer, 1)))
    assert batch["targets"][batch["loss_mask"] > 0].tolist() == [*b"Hello"]
    with pytest.raises(ConfigError, match="chat.jsonl:1: .*apply_chat"):
        data.train(tokenizer, 1)


def test_templates_that_rewrite_history_are_refused(tmp_path, tokenizer):
    class Rewriting(type(tokenizer)):
        def apply_chat(self, messages, add_generation_prompt=True):
            return f"{len(messages)} " + "".join(m["content"] for m in messages)

    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(FormatError, match="rewrites earlier messages"):
        TextData(source=path, eval_source=path).train(Rewriting(), 1)


def test_bos_and_tokenizer_cache(corpus, tokenizer):
    data = TextData(source=corpus, add_bos=True, packing="none", seq_len=128)
    batch = next(iter(data.train(tokenizer, 4)))
    assert (batch["tokens"][:, 0] == 257).all() and (batch["loss_mask"][:, 0] == 1).all()
    data.train(tokenizer, 4)
    assert len(data._cache) == 1, "tokenised once"

    class NoBos(type(tokenizer)):
        bos_id = None

    with pytest.raises(ConfigError, match="bos_id"):
        data.train(NoBos(), 4)


def test_empty_and_impossible(tmp_path, tokenizer):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ConfigError, match="empty.jsonl.*no data"):
        TextData(source=str(empty)).train(tokenizer, 1)
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(ConfigError, match="no data"):
        TextData(source=blank).train(tokenizer, 1)
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "x" * 40}] * 3)
    with pytest.raises(FormatError, match=r"long.jsonl:\d: 41 tokens exceed seq_len=8"):
        TextData(source=long, seq_len=8, too_long="error").train(tokenizer, 1)
    with pytest.raises(ConfigError, match="too_long=drop: no data"):
        TextData(source=long, seq_len=8, too_long="drop").train(tokenizer, 1)
    with pytest.raises(ConfigError, match="no data in them"):
        TextData(source=long, seq_len=8, too_long="drop", lazy=True).train(tokenizer, 1)
    with pytest.raises(ConfigError, match="no data in them"):
        TextData(source=blank, lazy=True).train(tokenizer, 1)
    with pytest.raises(ConfigError, match="do not fill one batch of 64"):
        TextData(source=long, seq_len=8, epochs=1).train(tokenizer, 64)
    with pytest.raises(ConfigError, match=r"split_fraction must be in \[0, 1\)"):
        TextData(source=long, split_fraction=1.0).train(tokenizer, 1)
    with pytest.raises(ConfigError, match="unknown packing"):
        TextData(source=long, packing="dense")
    with pytest.raises(ConfigError, match="held-out part .* no data"):
        TextData(source=long, split_fraction=0).evaluation(tokenizer, 1)


def test_chat_template_of_a_real_kind_of_tokenizer(tmp_path):
    """ChatML ids through the project's tokenizer, whose answers may merge with the prompt."""
    tokenizers = pytest.importorskip("tokenizers")
    from flora_jax.io.tokenizer import END, START, Tokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    texts = ["Hello Adieu\n\n assistant user"] * 9
    trainer = tokenizers.trainers.BpeTrainer(
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[START, END],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend, eos_id=backend.token_to_id(END), system="Be kind.")
    chat = [dict(m) for m in CHAT]
    chat[1]["content"] = "\n\nHello"  # "\n\n" is one token: the prompt is not a prefix of it.
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}])
    data = TextData(source=path, eval_source=path, seq_len=128, packing="none")
    batch = next(iter(data.train(tokenizer, 1)))
    trained = batch["targets"][batch["loss_mask"] > 0]
    text = tokenizer.decode(trained.tolist(), skip_special=False)
    assert text == f"\n\n\nHello{END}\nAdieu{END}\n"
    row = batch["tokens"][0][batch["segment_ids"][0] > 0].tolist()
    assert row == tokenizer.apply_chat(chat, add_generation_prompt=False)
