"""A cut-down experiment through ``flora sweep`` and ``flora table``."""

import json
import shutil
from pathlib import Path

import pytest

from flora_jax.cli import main
from flora_jax.launch.experiment import Experiment
from flora_jax.training.run_dir import RunDir

pytest.importorskip("sklearn")
FLORA_CONV = Path(__file__).parents[2] / "experiments" / "flora_conv"
FEW = """
SEEDS = (0,)
_digits, _teacher = digits, teacher


def digits():
    yield list(_digits())[2]


def teacher():
    for setting in list(_teacher())[:1]:
        yield {**setting, "steps": 3}
"""
CLAIMS = {
    "checks": [
        {"check": "lt", "metric": "mse", "left": {"rate": 1e-2}, "right": 1.0, "why": "below W0"}
    ]
}


def test_sweep_and_table(tmp_path, capsys):
    folder, out = tmp_path / "tiny_conv", tmp_path / "runs"
    shutil.copytree(FLORA_CONV, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "sweep.py", "a") as file:
        file.write(FEW)
    with open(folder / "base.gin", "a") as file:
        file.write("steps = 3\nPretraining.steps = 3\n")
    (folder / "expected.json").write_text(json.dumps(CLAIMS))
    where = ["--experiment", str(folder), "--out", str(out)]
    assert main(["sweep", *where]) == 0
    cnn, student = (
        RunDir(out / run.id).status()["result"] for run in Experiment.find(folder).runs()
    )
    assert cnn["trained_adapters"] == 176 and cnn["trained"] == 176 + 32 * 5 + 5
    assert 0 <= cnn["retention"] <= 100
    assert student["trained"] == student["trained_adapters"] == 106
    assert 0.2 < student["mse_before"] < 0.3 and 0 < student["mse"] < 1
    assert main(["table", *where]) == 0
    text = capsys.readouterr().out
    assert "## Digits 5-9\n| setting | seeds | Accuracy on 5-9, % |" in text
    assert "| FLoRA r=2, window 2 | 1 |" in text and "- holds  mse: " in text
    teacher = text.split("orthogonal core\n")[1]
    assert teacher.startswith("| setting | seeds | Mean squared error |")
    assert (out / "plot.png").stat().st_size > 10_000
