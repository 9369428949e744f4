"""The convolution teacher: its targets, its ranks and the closed form of its floors."""

import jax
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.data import ConvTeacherStudent


def convolve(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)


@pytest.mark.parametrize("core", ["orthogonal", "gaussian"])
def test_targets_ranks_and_norm(core):
    task = ConvTeacherStudent(shape=(3, 2, 4, 6), ranks=(2, 1, 2, 3), core=core, size=5)
    w0, update = task.teacher()
    batch = next(iter(task.train(None, 4, seed=3)))
    assert batch["x"].shape == (4, 5, 5, 4) and batch["y"].shape == (4, 3, 4, 6)
    np.testing.assert_allclose(convolve(batch["x"], w0 + update), batch["y"], atol=1e-5)
    for axis, rank in enumerate(task.ranks):
        unfolded = np.moveaxis(update, axis, 0).reshape(task.shape[axis], -1)
        assert np.linalg.matrix_rank(unfolded, tol=1e-5) == rank
    np.testing.assert_allclose(np.linalg.norm(update), 0.5 * np.linalg.norm(w0), rtol=1e-5)


def test_equal_singular_values_and_floors():
    task = ConvTeacherStudent(ranks=(1, 2, 3, 4), size=6)
    _, update = task.teacher()
    s = np.linalg.svd(update.reshape(-1, 32), compute_uv=False)
    np.testing.assert_allclose(s[:4], s[0], rtol=1e-5)
    floors = [task.floor(rank) for rank in range(6)]
    expected = [np.sum(update**2) / 32 * max(0, 4 - rank) / 4 for rank in range(6)]
    np.testing.assert_allclose(floors, expected, rtol=1e-5, atol=1e-12)


def test_the_floor_is_the_error_of_the_best_matrix_of_that_rank():
    task = ConvTeacherStudent(core="gaussian", noise=0.1, eval_size=600)
    w0, update = task.teacher()
    u, s, vt = np.linalg.svd(update.reshape(-1, 32), full_matrices=False)
    for rank in (0, 1, 2):
        best = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(task.shape)
        (batch,) = task.evaluation(None, 600)
        error = np.mean((convolve(batch["x"], w0 + best) - batch["y"]) ** 2)
        assert abs(error / task.floor(rank) - 1) < 0.05


def test_teachers_differ_and_evaluation_repeats():
    one, other = ConvTeacherStudent(), ConvTeacherStudent(task_seed=1)
    assert not np.allclose(one.teacher()[1], other.teacher()[1])
    first, again = (list(one.evaluation(None, 100)) for _ in range(2))
    assert [b["weight"].sum() for b in first] == [100, 100, 56]
    np.testing.assert_array_equal(first[1]["y"], again[1]["y"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ranks": (1, 1, 2, 3)}, "rank 3 of axis 3 of .* between 1 and 2"),
        ({"ranks": (4, 2, 2, 2)}, "rank 4 of axis 0"),
        ({"ranks": (0, 1, 2, 2)}, "rank 0 of axis 0"),
        ({"size": 2}, "size=2 is smaller than the window"),
        ({"core": "orthogonl"}, "nearest: orthogonal"),
    ],
)
def test_impossible_tasks(options, message):
    with pytest.raises(ConfigError, match=message):
        ConvTeacherStudent(**options)
