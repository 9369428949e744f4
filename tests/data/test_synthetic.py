"""Synthetic tasks: teachers of the stated structure, floors, sequence rules."""

import itertools

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.data import SequenceTask, Sine, TeacherStudent
from flora_jax.data.synthetic import STRUCTURES


@pytest.mark.parametrize("structure", STRUCTURES)
def test_teacher_structure(structure):
    task = TeacherStudent(d=12, d_out=8, k=2, structure=structure, scale=0.3)
    w0, update = task.teacher()
    assert w0.shape == update.shape == (12, 8) and w0.dtype == update.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(update), 0.3 * np.linalg.norm(w0), rtol=1e-5)
    if structure in ("low_rank", "output_side", "singular_values"):
        assert np.linalg.matrix_rank(update, tol=1e-5) == 2
    if structure == "output_side":
        m = np.linalg.pinv(w0) @ update
        np.testing.assert_allclose(w0 @ m, update, atol=1e-5)
    if structure == "singular_values":
        u, _, vt = np.linalg.svd(w0, full_matrices=False)
        middle = u.T @ update @ vt.T
        np.testing.assert_allclose(middle - np.diag(np.diag(middle)), 0, atol=1e-5)
    if structure == "kronecker":
        # The rearranged update (Van Loan) has rank = number of terms; factors (3,2) x (4,4).
        rearranged = update.reshape(3, 4, 2, 4).transpose(0, 2, 1, 3).reshape(6, 16)
        assert np.linalg.matrix_rank(rearranged, tol=1e-5) == 2
    if structure == "block_diagonal":
        assert (update[:6, 4:] == 0).all() and (update[6:, :4] == 0).all()


def test_output_side_update_of_a_rank_deficient_start():
    w0, update = TeacherStudent(d=10, k=4, base_rank=3, structure="output_side").teacher()
    assert np.linalg.matrix_rank(w0, tol=1e-5) == 3
    assert np.linalg.matrix_rank(update, tol=1e-5) == 3


def test_floor_is_what_the_best_update_reaches():
    task = TeacherStudent(d=10, k=4, condition=20.0, noise=0.1)
    w0, update = task.teacher()
    root = np.sqrt(task.covariance())[:, None]
    u, s, vt = np.linalg.svd(root * update)
    best = ((u[:, :2] * s[:2]) @ vt[:2]) / root
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 10)) * root.T
    measured = np.mean((x @ (update - best)) ** 2) + 0.1**2
    np.testing.assert_allclose(task.floor(2), measured, rtol=0.02)
    assert task.floor(4) == pytest.approx(0.01)
    batch = next(iter(task.train(batch_size=50_000)))
    residual = batch["y"] - batch["x"] @ (w0 + update)
    np.testing.assert_allclose(residual.std(), 0.1, rtol=0.05)
    np.testing.assert_allclose(batch["x"].var(0), task.covariance(), rtol=0.05)


def test_streams_resume_shard_and_repeat():
    task = TeacherStudent(d=4, k=1)
    whole = list(itertools.islice(task.train(batch_size=6, seed=5), 10))
    iterator = iter(task.train(batch_size=6, seed=5))
    for _ in range(5):
        next(iterator)
    resumed = iter(task.train(batch_size=6, seed=5))
    resumed.set_state(iterator.get_state())
    assert all(np.array_equal(next(resumed)["x"], b["x"]) for b in whole[5:])
    part = next(iter(task.train(batch_size=6, seed=5, shard=(1, 2))))
    np.testing.assert_array_equal(part["x"], whole[0]["x"][1::2])
    assert not np.array_equal(whole[0]["x"], whole[1]["x"])
    batches = list(task.evaluation(batch_size=100))
    assert sum(b["weight"].sum() for b in batches) == 1024 and len(batches) == 11
    again = list(task.evaluation(batch_size=100))
    assert np.array_equal(batches[3]["y"], again[3]["y"])


def test_sine():
    task = Sine(cosine=0.3)
    batch = next(iter(task.train(batch_size=50)))
    assert batch["x"].shape == (50, 1)
    assert len(np.unique(batch["x"])) == 50, "one epoch is every point once"
    noise = batch["y"] - task.curve(batch["x"])
    assert 0.03 < noise.std() < 0.07
    clean = next(iter(task.evaluation()))
    x = clean["x"].astype(np.float64)
    wanted = np.sin(2 * np.pi * x) + 0.3 * np.cos(3 * np.pi * x)
    np.testing.assert_allclose(clean["y"], wanted, atol=1e-5)
    assert clean["x"].min() == -1 and clean["x"].max() == 1 and len(clean["x"]) == 100


def test_errors():
    with pytest.raises(ConfigError, match="unknown structure 'lowrank'; nearest: low_rank"):
        TeacherStudent(structure="lowrank")
    with pytest.raises(ConfigError, match="k=9 must be between 1 and 8"):
        TeacherStudent(d=8, k=9)
    with pytest.raises(ConfigError, match="3 blocks do not divide"):
        TeacherStudent(d=8, k=3, structure="block_diagonal")
    with pytest.raises(ConfigError, match="unknown task"):
        SequenceTask(task="recal")
    with pytest.raises(ConfigError, match="vocab=8: recall of 16 needs 34"):
        SequenceTask(vocab=8)


@pytest.mark.parametrize("task", ["copy", "recall", "induction"])
def test_answers_follow_from_what_was_seen(task):
    data = SequenceTask(task=task, length=5, vocab=12)
    batch = next(iter(data.train(batch_size=40, seed=3)))
    assert batch["tokens"].shape == (40, data.seq_len) and (batch["segment_ids"] == 1).all()
    np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
    asked = {"copy": 5, "recall": 5, "induction": 1}[task]
    assert (batch["loss_mask"].sum(1) == asked).all()
    for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"]):
        for t in np.flatnonzero(mask):
            if task == "recall":
                assert 0 < tokens[t] < 6 <= targets[t] < 12, "keys and values are other symbols"
            if task == "copy":
                assert targets[t] == tokens[t - 5]
            else:
                seen = tokens[: 2 * 5] if task == "recall" else tokens[:t]
                keys = seen[::2] if task == "recall" else seen
                at = np.flatnonzero(keys == tokens[t])
                assert len(at) == 1, "the question is unambiguous"
                step = 2 if task == "recall" else 1
                assert targets[t] == seen[step * at[0] + 1]
    assert sum(b["loss_mask"].sum() for b in data.evaluation(batch_size=100)) == 256 * asked
