"""Sweeps: skip what is done, survive a kill, aggregate over seeds, check the claims."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.launch import checks
from flora_jax.launch.experiment import Experiment, gin_text
from flora_jax.launch.sweep import sweep
from flora_jax.launch.table import draw, markdown, number, table
from flora_jax.training.run_dir import RunDir

TOY = Path(__file__).parent / "toy"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The toy experiment, every run done."""
    out = tmp_path_factory.mktemp("swept")
    assert sweep(Experiment.find(TOY), out) == 0
    return out


def test_every_run_has_its_folder(swept):
    runs = Experiment.find(TOY).runs()
    assert len(runs) == 6 and len({run.id for run in runs}) == 6
    for run in runs:
        status = RunDir(swept / run.id).status()
        assert status["state"] == "done" and status["identity"] == run.id
        slope, seed = run.bindings["toy.slope"], run.bindings["toy.seed"]
        assert abs(status["result"]["score"] - 10 * slope) <= 0.1
        assert f"toy.seed = {seed}" in (swept / run.id / "operative.gin").read_text()
        assert (swept / run.id / "log.txt").read_text() == f"slope {slope}\n"
        environment = json.loads((swept / run.id / "environment.json").read_text())
        assert environment["versions"]["jax"] and "--experiment=toy" in environment["argv"]


def test_finished_runs_are_skipped_and_failed_ones_tried_again(swept, tmp_path):
    shutil.copytree(swept, tmp_path / "out")
    experiment = Experiment.find(TOY)
    first, second, *_ = experiment.runs()
    RunDir(tmp_path / "out" / second.id).write_status(state="failed")
    before = {r.id: RunDir(tmp_path / "out" / r.id).status()["updated"] for r in experiment.runs()}
    assert sweep(experiment, tmp_path / "out") == 0
    after = {r.id: RunDir(tmp_path / "out" / r.id).status()["updated"] for r in experiment.runs()}
    assert [i for i in before if before[i] != after[i]] == [second.id]


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, capsys):
    experiment = Experiment.find(TOY)
    assert sweep(experiment, tmp_path, extra=["toy.fail=True"], limit=2, jobs=2) == 2
    run = experiment.runs(["toy.fail=True"])[0]
    status = RunDir(tmp_path / run.id).status()
    assert status["state"] == "failed"
    assert status["error"] == "ValueError: told to fail"
    assert "told to fail" in (tmp_path / run.id / "error.txt").read_text()
    assert "told to fail" in capsys.readouterr().out


def test_a_killed_sweep_continues(tmp_path):
    command = [
        sys.executable,
        "-m",
        "flora_jax",
        "sweep",
        f"--experiment={TOY}",
        f"--out={tmp_path}",
        "--gin.toy.pause=0.6",
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not _done(tmp_path):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while _alive(process.pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid), "a worker outlived its sweep"
    done = _done(tmp_path)
    assert 0 < len(done) < 6
    stamps = {run: RunDir(run).status()["updated"] for run in done}
    assert sweep(Experiment.find(TOY), tmp_path, extra=["toy.pause=0.6"], jobs=3) == 0
    assert len(_done(tmp_path)) == 6
    assert all(RunDir(run).status()["updated"] == stamps[run] for run in done)


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _done(out):
    folders = [p.parent for p in Path(out).glob("*/status.json")]
    return [p for p in folders if RunDir(p).status().get("state") == "done"]


def test_table_means_intervals_and_verdicts(swept, capsys):
    assert table(Experiment.find(TOY), swept) == 0
    text = (swept / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| setting | seeds | Score | Score (paper) |" in text
    assert "| slope 2.0 | 3 | 20.0" in text and "| 19.5 |" in text
    assert text.count("holds") == 2 and "FAILS" not in text
    assert (swept / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_claim_is_an_error_code(swept, monkeypatch, capsys):
    claim = {"check": "gt", "metric": "score"}
    claim |= {"left": {"toy.slope": 1.0}, "right": {"toy.slope": 2.0}}
    monkeypatch.setattr(Experiment, "expected", lambda self: [claim])
    assert table(Experiment.find(TOY), swept) == 1
    assert "- FAILS  score: [toy.slope=1.0] " in capsys.readouterr().out


def test_unfinished_runs_are_named(swept, tmp_path, capsys):
    experiment = Experiment.find(TOY)
    runs = experiment.runs()
    for run in runs[:3]:
        shutil.copytree(swept / run.id, tmp_path / run.id)
    with pytest.raises(ConfigError, match="unknown setting"):
        table(experiment, tmp_path)  # a claim about a setting without runs
    with pytest.raises(ConfigError, match="flora sweep --experiment toy"):
        table(experiment, tmp_path / "nothing")


def _groups():
    return [
        checks.Group({"m": "a", "r": 1}, {(0,): {"x": 1.0}, (1,): {"x": 2.0}, (2,): {"x": 3.0}}),
        checks.Group({"m": "b", "r": 1}, {(0,): {"x": 2.0}, (1,): {"x": 2.5}, (2,): {"x": 2.0}}),
        checks.Group({"m": "b", "r": 2}, {(0,): {"x": 9.0}}),
    ]


def test_interval_is_student_t():
    a, _, single = _groups()
    # t(0.975, 2) = 4.302653; s = 1, n = 3
    assert a.mean("x") == 2.0
    np.testing.assert_allclose(a.interval("x"), 4.302652729696 / math.sqrt(3), rtol=1e-9)
    assert math.isnan(single.interval("x"))


@pytest.mark.parametrize(
    "check, holds",
    [
        ({"check": "ge", "left": {"m": "a"}, "right": {"m": "b", "r": 1}}, False),
        ({"check": "ge", "left": {"m": "a"}, "right": {"m": "b", "r": 1}, "margin": 0.2}, True),
        ({"check": "gt", "left": {"m": "b", "r": 1}, "right": {"m": "a"}}, True),
        ({"check": "gt", "left": {"m": "b", "r": 1}, "right": {"m": "a"}, "margin": 0.2}, False),
        ({"check": "le", "left": {"m": "a"}, "right": 2.0}, True),
        ({"check": "lt", "left": {"m": "a"}, "right": 2.0}, False),
        ({"check": "near", "left": {"m": "a"}, "right": {"m": "b", "r": 1}, "margin": 0.17}, True),
        ({"check": "ge", "left": {"m": "b"}, "right": 9.0, "reduce": "max"}, True),
        ({"check": "wins", "left": {"m": "b", "r": 1}, "right": {"m": "a"}, "at_least": 2}, True),
        ({"check": "wins", "left": {"m": "b", "r": 1}, "right": {"m": "a"}}, False),
    ],
)
def test_checks(check, holds):
    assert checks.judge({"metric": "x", **check}, _groups()).holds is holds


@pytest.mark.parametrize(
    "check, message",
    [
        ({"check": "more", "left": {"m": "a"}, "right": 1}, "unknown check 'more'"),
        ({"check": "ge", "left": {"m": "c"}, "right": 1}, "unknown setting"),
        ({"check": "ge", "left": {"m": "b"}, "right": 1}, "selects 2 settings"),
        ({"check": "ge", "left": {"m": "a"}}, "needs 'right'"),
        ({"check": "ge", "left": {"m": "a"}, "right": 1, "margn": 1}, "nearest: margin"),
        ({"check": "ge", "left": {"m": "a"}, "right": 1, "metric": "y"}, "unknown metric 'y'"),
    ],
)
def test_malformed_checks(check, message):
    with pytest.raises(ConfigError, match=message):
        checks.judge({"metric": "x", **check}, _groups())


def test_default_table_and_curves(tmp_path):
    class Module:
        x = "r"

    text = markdown(_groups(), None)
    assert "| m=a, r=1 | 3 | 2.0 ± 2.5 |" in text and "| m=b, r=2 | 1 | 9 |" in text
    draw(_groups(), Module, tmp_path / "p.png")
    draw(_groups(), None, tmp_path / "q.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert number(0.123456, 0.00321) == "0.1235 ± 0.0032"


def test_gin_text_of_sweep_values():
    assert gin_text("@LoRA()") == "@LoRA()" and gin_text("svd") == "'svd'"
    nested = gin_text({"a/.*": "%adapter", "n": [1, 2.5, None]})
    assert nested == "{'a/.*': %adapter, 'n': [1, 2.5, None]}"
    assert gin_text(()) == "()" and gin_text((1,)) == "(1,)"


def test_unknown_experiment_and_twins(tmp_path):
    with pytest.raises(ConfigError, match="unknown experiment 'nope'"):
        Experiment.find("nope")
    (tmp_path / "sweep.py").write_text("def sweep():\n    yield {}\n    yield {}\n")
    (tmp_path / "base.gin").write_text("")
    with pytest.raises(ConfigError, match="same run twice"):
        Experiment.find(tmp_path).runs()
