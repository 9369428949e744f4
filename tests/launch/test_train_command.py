"""One run from the command line to its reload, merge and export."""

import json

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.cli import main
from flora_jax.core.paths import flatten
from flora_jax.launch import native
from flora_jax.launch.setup import reopen
from flora_jax.training.run_dir import RunDir


def test_the_run_folder_is_complete(trained):
    names = {p.name for p in trained.iterdir()}
    wanted = (
        "config.gin operative.gin environment.json status.json metrics.jsonl plan.txt plan.json"
    )
    assert set(wanted.split()) | {"checkpoints"} <= names
    status = RunDir(trained).status()
    assert status["state"] == "done" and status["step"] == status["steps"] == 4
    result = status["result"]
    assert result["perplexity"] < result["perplexity_before"]
    assert result["trained"] == 2 * (2 * (64 + 64) + 2 * (64 + 32))
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["argv"][0] == "flora" and environment["versions"]["jax"] == jax.__version__
    assert "AdamW.b1 = 0.9" in (trained / "operative.gin").read_text()
    steps = [line["step"] for line in RunDir(trained).metrics()]
    assert steps == [2, 4]


def test_train_prints_plan_figures_samples_and_next_commands(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", "--gin.adapter=@DoRA", f"--out={out}"]
    assert main([*words, "--gin.train.steps=1"]) == 0
    text = capsys.readouterr().out
    assert "layers/self_attn/q_proj/kernel  2x64x64" in text and "DoRA()" in text
    assert "before: perplexity" in text and "after: perplexity" in text
    assert text.count("'the fox") == 2
    assert f"flora merge --run {out} --out {out}/merged" in text
    assert f"flora convert --run {out} --out {out}/peft" in text


def test_eval_reloads_the_same_figures(trained, capsys):
    assert main(["eval", "--run", str(trained), "--base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    result = RunDir(trained).status()["result"]
    assert found["step 4"]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    assert found["base"]["perplexity"] == pytest.approx(result["perplexity_before"], rel=1e-6)


def test_the_same_command_again_changes_nothing_and_another_is_refused(tiny, trained, capsys):
    before = RunDir(trained).status()["result"]["perplexity"]
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--out={trained}"]
    assert main(words) == 0
    assert RunDir(trained).status()["result"]["perplexity"] == pytest.approx(before, rel=1e-6)
    config = (trained / "config.gin").read_text()
    assert main([*words, "--gin.LoRA.rank=3"]) == 1
    assert "already holds another run" in capsys.readouterr().err
    assert (trained / "config.gin").read_text() == config


def test_merge_then_the_plain_model_is_the_adapted_one(trained, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", "--run", str(trained), "--out", str(out)]) == 0
    setup, state = reopen(trained)
    want = flora.materialize(setup.bound(state))
    model, params = io.load_hf(out)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(want)[path], err_msg=path)
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--prompt", "the", "--max_tokens", "5"]) == 0
    merged = capsys.readouterr().out
    assert main(["generate", "--run", str(trained), "--prompt", "the", "--max_tokens", "5"]) == 0
    assert capsys.readouterr().out == merged and merged.startswith("the")
    assert main(["merge", "--run", str(trained), "--out", str(out)]) == 1
    assert "already holds a model" in capsys.readouterr().err


def test_sampling_depends_on_the_seed_alone(trained, capsys):
    def sample(seed):
        words = ["generate", "--run", str(trained), "--prompt", "the", "--max_tokens", "8"]
        assert main([*words, "--temperature", "1.0", "--top_p", "0.95", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1") != sample("2")


def test_convert_to_peft_and_back(trained, tmp_path):
    out = tmp_path / "peft"
    assert main(["convert", "--run", str(trained), "--out", str(out)]) == 0
    setup, state = reopen(trained)
    plan, adapters = io.load_peft(out, setup.base, setup.subject.model)
    bound = flora.materialize(flora.bind(setup.base, adapters, plan))
    want = flora.materialize(setup.bound(state))
    for path, leaf in flatten(bound).items():
        np.testing.assert_allclose(leaf, flatten(want)[path], atol=1e-6, err_msg=path)


def test_convert_between_formats(tiny, trained, tmp_path, capsys):
    gguf, ours, hf = (tmp_path / name for name in ("m.gguf", "ours", "hf"))
    assert main(["convert", "--run", str(trained), "--out", str(gguf), "--to", "gguf"]) == 0
    assert main(["convert", str(gguf), "--out", str(ours), "--to", "flora"]) == 0
    assert main(["convert", str(ours), "--out", str(hf)]) == 0
    setup, state = reopen(trained)
    want = flatten(flora.materialize(setup.bound(state)))
    for path, leaf in flatten(io.load_hf(hf)[1]).items():
        np.testing.assert_allclose(leaf, want[path], rtol=1e-6, err_msg=path)
    assert main(["convert", str(tiny / "model"), "--out", str(hf)]) == 1
    assert "exists: choose another --out" in capsys.readouterr().err
    assert main(["convert", str(tiny / "model"), "--out", str(tmp_path / "p"), "--to", "peft"]) == 1
    assert "has no adapter: give a run folder" in capsys.readouterr().err


def test_quantize_writes_low_bits_that_load_and_train(tiny, tmp_path, capsys):
    out = tmp_path / "int4"
    words = ["quantize", str(tiny / "model"), "--format", "int4", "--block", "16"]
    assert main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "layers/mlp/down_proj/kernel" in text and "whole model" in text
    model, params, tokenizer = native.load(out)
    leaf = params["layers"]["mlp"]["down_proj"]["kernel"]
    assert type(leaf).__name__ == "QArray" and leaf.shape == (2, 128, 64)
    _, plain = io.load_hf(tiny / "model")
    error = np.abs(leaf.dense() - plain["layers"]["mlp"]["down_proj"]["kernel"])
    assert error.max() <= leaf.scale.max() * 0.5001 and tokenizer.eos_id == 256
    run = tmp_path / "run"
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--gin.LanguageModel.source={out}"]
    assert main([*words, "--gin.train.steps=1", "--gin.train.sample_tokens=0", f"--out={run}"]) == 0
    setup, state = reopen(run)
    assert setup.base["layers"]["mlp"]["down_proj"]["kernel"].fmt == leaf.fmt


def test_a_low_bit_run_says_what_its_merge_becomes(tiny, tmp_path, capsys):
    run, low = tmp_path / "run", "{'layers/mlp/.*/kernel': @Format()}"
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--gin.train.quantize={low}"]
    words += ["--gin.Format.name=int8", "--gin.train.rules={'layers/mlp/up_proj/kernel': @DoRA()}"]
    words += ["--gin.DoRA.rank=2", "--gin.train.steps=2", "--gin.train.sample_tokens=0"]
    assert main([*words, f"--out={run}"]) == 0
    merge = ["merge", "--run", str(run), "--out"]
    capsys.readouterr()
    assert main([*merge, str(tmp_path / "no")]) == 1
    assert "3 low-bit weights (layers/mlp/" in capsys.readouterr().err
    again = tmp_path / "again"
    assert main([*merge, str(again), "--quantized", "requantize"]) == 0
    table = capsys.readouterr().out
    row = table[table.index("layers/mlp/up_proj/kernel") :].split()
    assert "base's error" in table and 0 < float(row[1]) < 0.02 and 0 < float(row[3]) < 0.02
    setup, state = reopen(run)
    params = native.load(again)[1]["layers"]["mlp"]
    assert type(params["up_proj"]["kernel"]).__name__ == "QArray"
    want = flora.requantize(setup.bound(state))[0]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(params["up_proj"]["kernel"].values, want.values)
    dense = tmp_path / "dense"
    assert main([*merge, str(dense), "--quantized", "dequantize"]) == 0
    assert io.load_hf(dense)[1]["layers"]["mlp"]["up_proj"]["kernel"].dtype == np.float32
    lora = ["convert", "--run", str(run), "--to", "lora", "--out", str(tmp_path / "lora")]
    assert main(lora) == 1 and "give rank=" in capsys.readouterr().err
    assert main([*lora, "--rank", "64"]) == 0
    assert "layers/mlp/up_proj/kernel  lora" in capsys.readouterr().out
    base, model = flora.dequantize(setup.base), setup.subject.model
    plan, adapters = io.load_peft(tmp_path / "lora", base, model)
    bound = flora.bind(setup.base, adapters, plan)
    merged, want = (
        flora.materialize(tree, quantized="dequantize")["layers"]["mlp"]["up_proj"]["kernel"]
        for tree in (bound, setup.bound(state))
    )
    np.testing.assert_allclose(merged, want, atol=1e-5)


def test_extract_undoes_a_merge(tiny, trained, tmp_path, capsys):
    tuned, out = tmp_path / "tuned", tmp_path / "lora"
    assert main(["merge", "--run", str(trained), "--out", str(tuned)]) == 0
    words = ["extract", "--base", str(tiny / "model"), "--tuned", str(tuned), "--out", str(out)]
    assert main([*words, "--rule", ".*/(q|v)_proj/kernel", "--error", "1e-3"]) == 0
    assert "layers/self_attn/q_proj/kernel  lora  2" in capsys.readouterr().out
    setup, state = reopen(trained)
    plan, adapters = io.load_peft(out, setup.base, setup.subject.model)
    found = flora.materialize(flora.bind(setup.base, adapters, plan))
    for path, leaf in flatten(flora.materialize(setup.bound(state))).items():
        np.testing.assert_allclose(flatten(found)[path], leaf, atol=1e-4, err_msg=path)
    assert main([*words, "--rank", "2"]) == 1
    assert "exists: choose another --out" in capsys.readouterr().err


def test_plan_reports_what_xla_says(tiny, capsys):
    assert main(["plan", f"--gin_file={tiny / 'lm.gin'}"]) == 0
    text = capsys.readouterr().out
    assert "2 weights, 896 trained numbers" in text
    assert "one step, per device:" in text and "Gflop" in text


def test_bench_step(tiny, capsys):
    words = ["bench", "step", f"--gin_file={tiny / 'lm.gin'}", "--steps", "2", "--json"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens_per_s"] > 0 and figures["trained"] == 896
    assert main(["bench", "stpe"]) == 1
    assert "unknown benchmark 'stpe'; nearest: step" in capsys.readouterr().err


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "dry"
    assert main(["train", f"--gin_file={tiny / 'lm.gin'}", f"--out={out}", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "train.steps = 4" in text and "896 trained numbers" in text
    assert not out.exists()


def test_quickstart_compares_lora_and_flora(tiny, tmp_path, capsys):
    words = [f"--gin.LanguageModel.source={tiny / 'model'}", "--gin.steps=1"]
    words += [f"--gin.TextData.source={tiny / 'text.txt'}", "--gin.train.sample_tokens=0"]
    assert main(["quickstart", f"--out={tmp_path}", *words]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].startswith("method  trained  perplexity before")
    assert table[1].startswith("LoRA ") and table[2].startswith("FLoRA ")
    assert RunDir(tmp_path / "flora").status()["state"] == "done"


def test_bench_members(tiny, capsys):
    words = ["bench", "members", f"--gin_file={tiny / 'lm.gin'}", "--members", "2", "--json"]
    assert main([*words, "--steps", "2", "--rounds", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["members"] == figures["steps"] == 2
    assert figures["together_seconds"] > 0 and figures["largest_loss_difference"] < 1e-4
    assert main([*words, "--rounds", "0"]) == 1
    assert "--rounds must be at least 1" in capsys.readouterr().err


def test_bench_adapters(capsys):
    words = ["bench", "adapters", "--adapters", "2", "--length", "4", "--layers", "1", "--vocab"]
    assert main([*words, "16", "--rank", "2", "--rounds", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["forward"]) == ["base", "one adapter", "mixed batch", "2 calls"]
    assert figures["training"]["one adapter"]["ratio"] == 1.0
    assert figures["training"]["mixed batch"]["seconds"] > 0
    assert main([*words, "0"]) == 1
    assert "--vocab 0 must be at least 1" in capsys.readouterr().err
