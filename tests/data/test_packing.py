"""Packing: every token exactly once, no cross-segment target, masks and positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.data.packing import PACKINGS, Tokenised, assemble, plan_rows

SETTINGS = settings(max_examples=150, deadline=None)
# Each document: prompt length and completion length.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 25)), min_size=0, max_size=12)
POLICIES = st.sampled_from(["split", "truncate", "drop"])


def corpus_of(parts):
    """Documents whose tokens are all different (1, 2, 3, ...), so that each can be traced."""
    documents, at = [], 1
    for prompt, completion in parts:
        n = prompt + completion
        documents.append((np.arange(at, at + n, dtype=np.int32), np.arange(n) >= prompt))
        at += n
    return Tokenised.join(documents, [f"file:{k + 1}" for k in range(len(documents))])


def rows_of(corpus, seq_len, packing, too_long):
    plan = plan_rows(corpus.lengths, seq_len, packing, too_long)
    return [assemble(corpus, plan, r, seq_len) for r in range(len(plan))]


@SETTINGS
@given(DOCUMENTS, st.integers(1, 12), st.sampled_from(PACKINGS), POLICIES)
def test_tokens_exactly_once(parts, seq_len, packing, too_long):
    corpus = corpus_of(parts)
    rows = rows_of(corpus, seq_len, packing, too_long)
    packed = [t for row in rows for t in row["tokens"][row["segment_ids"] > 0].tolist()]
    wanted = []
    for begin, end in zip(corpus.offsets, corpus.offsets[1:]):
        document = corpus.tokens[begin:end].tolist()
        if len(document) > seq_len and too_long == "truncate":
            document = document[:seq_len]
        elif len(document) > seq_len and too_long == "drop":
            document = []
        wanted += document
    assert len(packed) == len(set(packed))
    assert sorted(packed) == wanted


@SETTINGS
@given(DOCUMENTS, st.integers(1, 12), st.sampled_from(PACKINGS), POLICIES)
def test_targets_masks_positions(parts, seq_len, packing, too_long):
    corpus = corpus_of(parts)
    document_of = np.repeat(np.arange(len(parts)), corpus.lengths)
    for row in rows_of(corpus, seq_len, packing, too_long):
        segments, tokens, mask = row["segment_ids"], row["tokens"], row["loss_mask"]
        assert (row["positions"][segments == 0] == 0).all() and (mask[segments == 0] == 0).all()
        real = segments[segments > 0]
        assert (np.diff(real) >= 0).all() and set(real) == set(range(1, real.max() + 1))
        assert (segments[len(real) :] == 0).all(), "padding only at the end"
        for s in range(1, real.max() + 1):
            where = np.flatnonzero(segments == s)
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
            assert len(set(document_of[tokens[where] - 1])) == 1
        for t in np.flatnonzero(segments):
            own = tokens[t] - 1
            follows = own + 1 < len(document_of) and document_of[own] == document_of[own + 1]
            if follows:
                assert row["targets"][t] == tokens[t] + 1
                assert mask[t] == corpus.trainable[own + 1]
            else:
                assert mask[t] == 0


@SETTINGS
@given(DOCUMENTS, st.integers(1, 12), st.sampled_from(PACKINGS))
def test_loss_counts_do_not_depend_on_packing(parts, seq_len, packing):
    corpus = corpus_of(parts)
    total = sum(row["loss_mask"].sum() for row in rows_of(corpus, seq_len, packing, "split"))
    # Every trainable token is a target once, but for the first token of a document.
    first = corpus.offsets[:-1][corpus.lengths > 0]
    assert total == corpus.trainable.sum() - corpus.trainable[first].sum()


@SETTINGS
@given(st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_first_fit_wastes_less_than_half(lengths):
    plan = plan_rows(np.array(lengths), 10, "first_fit")
    used = np.add.reduceat(plan.length, plan.first[:-1])
    assert used.max() <= 10
    # First fit: no two rows are at most half full, else they would be one row.
    assert (used <= 5).sum() <= 1
    assert len(plan) <= len(plan_rows(np.array(lengths), 10, "none"))


def test_concat_has_padding_only_in_the_last_row():
    corpus = corpus_of([(0, 5), (2, 9), (0, 4)])
    rows = rows_of(corpus, 8, "concat", "split")
    assert [int((r["segment_ids"] > 0).sum()) for r in rows] == [8, 8, 4]
    assert rows[0]["segment_ids"].tolist() == [1] * 5 + [2] * 3
    assert rows[0]["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert rows[0]["targets"].tolist() == [2, 3, 4, 5, 0, 7, 8, 9]
    assert rows[0]["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0, 1, 1]


def test_many_documents_stay_linear():
    lengths = np.random.default_rng(0).integers(1, 200, 20_000)
    plan = plan_rows(lengths, 256, "first_fit")
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (256 * len(plan)) > 0.9


def test_policies_and_choices_are_checked():
    with pytest.raises(FormatError, match=r"a\.txt:2: 9 tokens exceed seq_len=8"):
        plan_rows(np.array([3, 9]), 8, "concat", "error", ["a.txt:1", "a.txt:2"])
    with pytest.raises(ConfigError, match="unknown packing 'first-fit'; nearest: first_fit"):
        plan_rows(np.array([3]), 8, "first-fit")
    with pytest.raises(ConfigError, match="unknown too_long"):
        plan_rows(np.array([3]), 8, "concat", "cut")
    with pytest.raises(ConfigError, match="seq_len"):
        plan_rows(np.array([3]), 0)
