"""A run that is asked to stop saves itself and can be used as it is."""

import os
import signal
import subprocess
import sys
import time

from flora_jax.cli import main
from flora_jax.training.run_dir import RunDir


def test_sigterm_saves_and_the_run_is_usable(tiny, tmp_path):
    out = tmp_path / "run"
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--out={out}", "--gin.train.steps=4000"]
    words += ["--gin.train.log_every=1", "--gin.train.sample_tokens=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flora_jax", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 120
    while time.time() < deadline and len(RunDir(out).metrics()) < 3:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    message = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1 and "stopped by SIGTERM at step" in message
    status = RunDir(out).status()
    assert status["state"] == "preempted" and 3 <= status["step"] < 4000
    assert "result" not in status
    stopped = status["step"]
    assert main(["eval", "--run", str(out)]) == 0
    assert max(int(p.name) for p in (out / "checkpoints").glob("[0-9]*")) == stopped
