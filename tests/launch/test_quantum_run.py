"""Quantum cells under `flora train`: no case of their own in the command."""

import json

import numpy as np

from flora_jax.cli import main
from flora_jax.launch.setup import reopen
from flora_jax.training.run_dir import RunDir

RUN = ["train", "--gin_file=runs/quantum_series.gin"]
READOUT = "--gin.train.rules={'readout/(kernel|bias)': @Replace()}"


def test_qfwp_learns_and_reloads(tmp_path, capsys):
    words = ["--gin.QFWP.qubits=4", "--gin.QFWP.measured=2", "--gin.steps=60"]
    assert main([*RUN, *words, f"--out={tmp_path}"]) == 0
    result = RunDir(tmp_path).status()["result"]
    assert result["mse"] < result["mse_before"] / 2
    assert result["trained"] == result["parameters"] == 8 + 10 + 20 + 3
    assert main(["eval", "--run", str(tmp_path)]) == 0
    assert f"mse {result['mse']:.6g}" in capsys.readouterr().out


def test_reservoir_with_a_solved_read_out(tmp_path):
    """Only the read-out is in the plan; ridge solved it before the first step."""
    words = ["--gin.cell=@QRNNReservoir", READOUT, "--gin.SmallSeriesModel.ridge=1e-6"]
    assert main([*RUN, *words, "--gin.steps=1", "--gin.rate=0.0", f"--out={tmp_path}"]) == 0
    result = RunDir(tmp_path).status()["result"]
    assert result["mse"] == result["mse_before"] < 0.1
    assert (result["trained"], result["parameters"]) == (4, 28)
    setup, state = reopen(tmp_path)
    cell, data = setup.subject.model.cell, setup.options["data"]
    x, y = data.arrays("train")
    h = np.asarray(cell.states(setup.base, x)[:, -1], float)
    kernel = np.linalg.lstsq(h - h.mean(0), y - y.mean(0), rcond=None)[0]
    np.testing.assert_allclose(setup.bound(state)["readout"]["kernel"], kernel, rtol=0.05)


def test_ridge_is_for_reservoirs(tmp_path, capsys):
    assert main([*RUN, "--gin.SmallSeriesModel.ridge=0.1", f"--out={tmp_path}"]) == 1
    assert "is for a QRNNReservoir, not QFWP" in capsys.readouterr().err


def test_flora_methods_lists_them(capsys):
    assert main(["methods", "--family", "attention", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["QFWP"]["arxiv"] == "2402.17760"
    assert rows["QRNNReservoir"]["parameters"] == "H O + O"
