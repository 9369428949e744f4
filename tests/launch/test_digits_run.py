"""The digits bench: pretrain on 0-4, adapt to 5-9, retention under the old head."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

from flora_jax.cli import main  # noqa: E402
from flora_jax.core.paths import flatten  # noqa: E402
from flora_jax.launch.setup import reopen  # noqa: E402
from flora_jax.training.run_dir import RunDir  # noqa: E402

WORDS = [
    "train",
    "--gin_file=runs/finetune_image.gin",
    "--gin.Pretraining.steps=60",
    "--gin.steps=40",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    assert main([*WORDS, "--gin.adapter=@NOLA", f"--out={out}"]) == 0
    return out


def test_it_learns_the_new_digits(run):
    result = RunDir(run).status()["result"]
    assert result["accuracy_before"] < 45 < 75 < result["accuracy"]
    assert result["trained"] == 2 * 1024 + 256 * 5 + 5
    assert 20 < result["retention"] <= 100


def test_the_base_is_kept_and_reloads_exactly(run, capsys):
    assert (run / "base.safetensors").is_file()
    assert main(["eval", "--run", str(run)]) == 0
    accuracy = RunDir(run).status()["result"]["accuracy"]
    assert f"accuracy {accuracy:.6g}" in capsys.readouterr().out
    setup, state = reopen(run)
    images, _ = setup.options["data"].arrays("test")
    bound = setup.bound(state)
    logits = jax.jit(setup.subject.model.apply)({"params": bound}, images)
    assert np.isfinite(logits).all() and logits.shape[1] == 5


def test_merge_of_a_model_that_hugging_face_does_not_know(run, tmp_path, capsys):
    from flora_jax.io import safetensors

    assert main(["merge", "--run", str(run), "--out", str(tmp_path)]) == 0
    saved = safetensors.TensorFiles(tmp_path / "model.safetensors")
    setup, _ = reopen(run)
    assert set(saved) == set(flatten(setup.base))
    assert main(["convert", "--run", str(run), "--out", str(tmp_path / "p")]) == 1
    assert "not a model that Hugging Face knows" in capsys.readouterr().err


@pytest.mark.parametrize("kind, method", [("conv", "FLoRA"), ("vit", "IA3")])
def test_the_other_small_models(kind, method, tmp_path):
    words = [*WORDS, f"--gin_file=models/digits_{kind}.gin", f"--gin.adapter=@{method}"]
    assert main([*words, "--gin.steps=3", "--gin.Pretraining.steps=3", f"--out={tmp_path}"]) == 0
    assert RunDir(tmp_path).status()["state"] == "done"
