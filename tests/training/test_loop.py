"""The loop in processes of its own: kill and resume, SIGTERM, many devices, many processes."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import simulated

from flora_jax.training import RunDir

HERE = Path(__file__).parent
SCRIPT = HERE / "fit_script.py"
RUN = {"steps": 10, "log_every": 1, "save_every": 5, "eval_every": 4, "progress": False}


def start(folder, devices=1, **options):
    env = {
        **simulated(devices, HERE.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps({**RUN, **options})]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out


def curve(folder):
    """Logged lines without the wall-clock figures."""
    lines = RunDir(Path(folder)).metrics()
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps in one go."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(folder))
    lines = curve(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8, 10]
    assert RunDir(folder).status()["state"] == "done"
    return lines


def test_kill_sigterm_and_resume_are_bit_identical(straight, tmp_path):
    folder = tmp_path / "run"
    finish(start(folder, die_at=7), code=-signal.SIGKILL)
    before = curve(folder)
    # the host looks at a step only after later ones have started: line 7 may not be out yet
    assert before == straight[: len(before)] and len(before) >= 5
    assert RunDir(folder).status()["state"] == "running"

    process = start(folder, slow=0.3, save_every=None)
    for line in process.stdout:
        if line == "batch 7\n":
            process.send_signal(signal.SIGTERM)
            break
    assert "ended preempted 8" in finish(process)
    assert RunDir(folder).status()["state"] == "preempted"
    assert curve(folder) == straight[:8]

    assert finish(start(folder)) == "batch 8\nbatch 9\nended done 10\n"
    assert curve(folder) == straight


def assert_same_curve(folder, straight):
    lines = curve(folder)
    assert len(lines) == len(straight)
    for a, b in zip(lines, straight, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "grad_norm", "weight", "eval/loss", "eval/accuracy"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{a['step']} {name}")


def test_eight_devices_give_the_same_curve_and_one_goes_on(straight, tmp_path):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    out = finish(start(tmp_path / "run", 8, mesh=mesh))
    assert "{'a': (None, 'fsdp', None), 'b': (None, None, 'tensor')}" in out
    assert_same_curve(tmp_path / "run", straight)
    assert "ended done 12" in finish(start(tmp_path / "run", steps=12))


def test_two_processes_give_the_same_curve(straight, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"mesh": {"data": 2, "tensor": 2}, "processes": 2, "port": port}
    both = [start(tmp_path / "run", 2, process=i, **common) for i in range(2)]
    for process in both:
        finish(process)
    assert_same_curve(tmp_path / "run", straight)
