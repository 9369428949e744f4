"""``flora train`` itself on 8 simulated devices, and stopping early."""

import json
import subprocess
import sys

import pytest
from processes import simulated

MESH = [
    "--gin.train.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}",
    "--gin.train.batch_size=8",
    "--gin.train.log_every=1",
]


def flora(folder, *words, devices=1):
    command = [sys.executable, "-m", "flora_jax", "train", *words]
    environment = simulated(devices)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_llama_on_eight_devices_has_the_same_losses(tiny, tmp_path):
    curves = {}
    for devices, mesh in ((1, MESH[1:]), (8, MESH)):
        out = tmp_path / f"run{devices}"
        words = [f"--gin_file={tiny / 'lm.gin'}", *mesh, f"--gin.train.out={out}"]
        done = flora(tmp_path, *words, devices=devices)
        assert done.returncode == 0, done.stderr[-2000:]
        curves[devices] = [line["loss"] for line in lines(out) if "loss" in line]
    assert len(curves[1]) == 4
    assert curves[8] == pytest.approx(curves[1], abs=1e-4)


def test_a_mesh_that_does_not_divide_the_devices(tiny, tmp_path):
    done = flora(
        tmp_path, f"--gin_file={tiny / 'lm.gin'}", "--gin.train.mesh={'data': 3}", devices=8
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert "3" in line and "8" in line


def test_early_stopping_from_gin(tiny, tmp_path):
    out = tmp_path / "run"
    words = [
        f"--gin_file={tiny / 'lm.gin'}",
        "--gin.train.steps=40",
        "--gin.train.eval_every=2",
        "--gin.train.early_stopping=@EarlyStopping",
        "--gin.EarlyStopping.patience=2",
        "--gin.EarlyStopping.min_delta=100.0",
        f"--gin.train.out={out}",
    ]
    done = flora(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    # the first evaluation sets the best, the next two are no improvement of 100
    assert max(line["step"] for line in lines(out)) == 6
