"""Runs whose adapters start from data: train, reload without calibrating again, export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io, training
from flora_jax.cli import main
from flora_jax.core.errors import ConfigError
from flora_jax.launch import calibration
from flora_jax.launch.setup import reopen
from flora_jax.training.losses import CausalLM, Classification, Regression
from flora_jax.training.run_dir import RunDir


@pytest.fixture
def no_calibration(monkeypatch):
    def refuse(*args, **kw):
        raise AssertionError("calibrated")

    monkeypatch.setattr(calibration.Calibrator, "start", refuse)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """EVA on q and o, KORE on an MLP kernel, on a mesh of one device."""
    out = tmp_path_factory.mktemp("calibrated") / "run"
    rules = "{'layers/self_attn/(q|o)_proj/kernel': @EVA(), 'layers/mlp/up_proj/kernel': @KORE()}"
    words = [f"--gin.train.rules={rules}", "--gin.EVA.rank=3", "--gin.KORE.rank=3"]
    words += ["--gin.EVA.tau=0.9999", "--gin.train.calibration_batches=3"]
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", *words, "--gin.train.mesh={'data': 1}"]
    assert main([*words, f"--out={out}"]) == 0
    return words, out


def test_it_learns_and_the_ranks_are_saved(run):
    _, out = run
    result = RunDir(out).status()["result"]
    assert result["perplexity"] < result["perplexity_before"]
    plan = flora.Plan.from_json((out / "plan.json").read_text())
    ranks = [e.adapter.ranks or (e.adapter.rank,) * 2 for e in plan if "self_attn" in e.path]
    assert sum(map(sum, ranks)) == 3 * 2 * 2 and len(set(sum(ranks, ()))) > 1
    assert result["trained"] == 12 * (64 + 64) + 2 * 3 * 128
    assert "EVA(" in (out / "plan.txt").read_text()


def test_reopened_without_calibrating(run, no_calibration, capsys):
    words, out = run
    assert main(["eval", "--run", str(out), "--base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = RunDir(out).status()["result"]
    assert found["step 4"]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    assert found["base"]["perplexity"] == pytest.approx(result["perplexity_before"], rel=1e-5)
    assert main(["plan", *words[1:], "--dry_run"]) == 0
    assert main(["train", *words[1:], "--dry_run"]) == 0


def test_the_same_command_again_finds_its_plan(run):
    words, out = run
    before = RunDir(out).status()["result"]["perplexity"]
    assert main([*words, f"--out={out}"]) == 0
    assert RunDir(out).status()["result"]["perplexity"] == pytest.approx(before, rel=1e-6)


def test_as_an_hf_peft_adapter(run, tmp_path):
    _, out = run
    assert main(["convert", "--run", str(out), "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    setup, state = reopen(out)
    plan, adapters = io.load_peft(tmp_path, setup.base, setup.subject.model)
    tokens = jnp.arange(12).reshape(1, 12)
    apply = jax.jit(lambda p: setup.subject.model.apply({"params": p}, tokens)[0])
    again = apply(flora.bind(setup.base, adapters, plan))
    np.testing.assert_allclose(again, apply(setup.bound(state)), atol=1e-4)


def test_fit_says_that_it_needs_a_start(tmp_path):
    params = {"kernel": jnp.ones((6, 4))}
    plan = flora.plan(params, {"kernel": flora.KORE(rank=2)})
    with pytest.raises(ConfigError, match=r"kernel: KORE starts from its inputs.*flora.calibrate"):
        training.fit(lambda *a: None, plan, params, [], steps=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_which_positions_count():
    tokens = jnp.zeros((2, 3), int)
    batch = {"tokens": tokens, "segment_ids": jnp.array([[1, 1, 0], [1, 2, 2]])}
    batch["loss_mask"] = jnp.array([[0.0, 1, 0], [1, 0, 0.5]])
    lm = CausalLM(model=None)
    assert lm.positions(batch, trained=False).tolist() == [[1, 1, 0], [1, 1, 1]]
    assert lm.positions(batch, trained=True).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert lm.positions({"tokens": tokens}, trained=True).tolist() == [[1] * 3] * 2
    texts = {
        "mask": jnp.array([[1, 0], [1, 1]]),
        "label": jnp.zeros(2),
        "weight": jnp.array([1, 0]),
    }
    classes = Classification(model=None, inputs=("tokens", "mask"))
    assert classes.positions(texts, trained=True).tolist() == [[1, 0], [0, 0]]
    assert Classification(model=None).positions(texts, trained=True).tolist() == [1, 0]
    values = {"x": tokens, "y": jnp.zeros((2, 1))}
    assert Regression(model=None).positions(values, trained=True).tolist() == [1, 1]
