"""``flora train`` with LIFT: what it reports as trained, and the run as a sparse delta."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

import flora_jax as flora  # noqa: E402
from flora_jax import io  # noqa: E402
from flora_jax.cli import main  # noqa: E402
from flora_jax.launch.setup import reopen  # noqa: E402

WORDS = [
    "train",
    "--gin_file=runs/finetune_image.gin",
    "--gin_file=optimizers/lift.gin",
    "--gin.Pretraining.steps=20",
    "--gin.steps=20",
    "--gin.LIFT.refresh=8",
]


def test_a_run_counts_and_keeps_what_it_moves(tmp_path, capsys):
    assert main([*WORDS, f"--out={tmp_path / 'run'}"]) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    k = 8 * (64 + 256) + 8 * (256 + 256)
    head = 256 * 5 + 5
    assert status["result"]["trained"] == k + head
    assert status["result"]["trained_adapters"] == k
    plan = (tmp_path / "run" / "plan.txt").read_text()
    assert f"{8 * 512:,}\n" in plan and f"{k + head:,} trained numbers" in plan
    out = tmp_path / "delta.safetensors"
    capsys.readouterr()
    words = ["convert", "--run", str(tmp_path / "run"), "--to", "delta", "--out", str(out)]
    assert main(words) == 0
    assert "entries of 4 weights" in capsys.readouterr().out
    setup, state = reopen(tmp_path / "run")
    delta = io.load_delta(out, setup.base)
    changed = sum(len(delta[f"dense_{i}/kernel"].indices) for i in (0, 1))
    # pixels that are always black have no gradient; three masks may hold more than k entries
    assert k / 2 < changed < 2 * k
    after = io.apply_delta(setup.base, delta)
    jax.tree.map(np.testing.assert_array_equal, after, flora.materialize(setup.bound(state)))
