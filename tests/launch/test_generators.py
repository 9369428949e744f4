"""A generator through ``flora train``; a converted one beside its frozen teacher."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

from flora_jax.cli import main  # noqa: E402
from flora_jax.core.paths import flatten  # noqa: E402
from flora_jax.io import safetensors  # noqa: E402
from flora_jax.launch.setup import reopen  # noqa: E402
from flora_jax.training.run_dir import RunDir  # noqa: E402

SMALL = [
    "--gin.DiTConfig.hidden_size=16",
    "--gin.DiTConfig.intermediate_size=16",
    "--gin.DiTConfig.num_hidden_layers=1",
    "--gin.DiTConfig.frequencies=8",
    "--gin.steps=3",
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("lit") / "run"
    words = ["train", "--gin_file=runs/dit_to_lit.gin", "--gin.Pretraining.steps=3", *SMALL]
    assert main([*words, f"--out={out}"]) == 0
    return out


def test_a_student_inherits_all_but_the_attention_and_leaves_its_teacher_alone(converted):
    """The card: every leaf outside the attention starts equal, every one inside differs."""
    setup, state = reopen(converted)
    base = setup.base
    teacher, student = flatten(base["teacher"]), flatten(setup.subject.own(base))
    inside = {path for path in student if path.startswith("layers/attention")}
    for path in teacher.keys() - inside:
        np.testing.assert_array_equal(student[path], teacher[path], err_msg=path)
    # Biases start at zero, but the teacher's have learnt.
    for path in inside & teacher.keys():
        assert not np.array_equal(student[path], teacher[path]), path
    assert inside - teacher.keys() == {
        f"layers/attention/attention/attention/depthwise/{name}" for name in ("kernel", "bias")
    }
    assert not any(entry.path.startswith("teacher/") for entry in setup.plan)
    result = RunDir(converted).status()["result"]
    assert result["trained"] == result["parameters"] == sum(a.size for a in student.values())
    assert {"noise_mse", "vlb", "match_noise", "match_variance"} <= result.keys()


def test_the_merged_student_has_no_teacher(converted, tmp_path):
    assert main(["merge", "--run", str(converted), "--out", str(tmp_path)]) == 0
    saved = safetensors.TensorFiles(tmp_path / "model.safetensors")
    setup, _ = reopen(converted)
    assert set(saved) == set(flatten(setup.subject.own(setup.base)))


def test_flow_matching_from_a_random_start(tmp_path):
    words = [
        "train",
        "--gin_file=runs/dit_digits.gin",
        "--gin.SmallGenerator.process=@FlowMatching",
        "--gin.DiTConfig.learned_variance=False",
        f"--out={tmp_path}",
    ]
    assert main([*words, *SMALL]) == 0
    result = RunDir(tmp_path).status()["result"]
    # A fresh network predicts nothing: the error is the velocity's mean square.
    assert 1 < result["noise_mse_before"] < 3 and result["noise_mse"] < result["noise_mse_before"]
    assert jax.tree.leaves(reopen(tmp_path)[1].train)
