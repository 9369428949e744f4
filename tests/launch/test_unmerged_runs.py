"""Runs of methods that change no weight: trained, continued, exported, and refused by merge."""

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.cli import main
from flora_jax.launch.setup import reopen
from flora_jax.training.run_dir import RunDir

RUNS = {
    "PromptTuning": (
        "'embed_tokens/embedding'",
        ["PromptTuning.tokens=5", "PromptTuning.init_from=text", "PromptTuning.text='the dog'"],
        "PROMPT_TUNING",
    ),
    "PrefixTuning": (
        "'layers/self_attn/(k|v)_proj/kernel'",
        ["PrefixTuning.tokens=3", "PrefixTuning.projection=8"],
        "PREFIX_TUNING",
    ),
    "Compacter": ("'layers/mlp/down_proj/kernel'", ["Compacter.bottleneck=8"], None),
}


@pytest.mark.parametrize("name", RUNS)
def test_from_the_command_line(name, tiny, tmp_path, capsys):
    where, settings, peft = RUNS[name]
    out, merged = tmp_path / "run", tmp_path / "merged"
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--out={out}", f"--gin.adapter=@{name}()"]
    words += [f"--gin.train.rules={{{where}: %adapter}}", *(f"--gin.{s}" for s in settings)]
    assert main(words) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert f"flora generate --run {out}" in text and "flora merge" not in text
    assert ("flora convert" in text) == (peft is not None)
    result = RunDir(out).status()["result"]
    assert result["perplexity"] < result["perplexity_before"]

    sample = next(line for line in text.splitlines() if line.startswith("after: '"))
    assert main(["generate", "--run", str(out), "--prompt", "the fox", "--max_tokens", "4"]) == 0
    assert repr(capsys.readouterr().out.removesuffix("\n")) == sample.removeprefix("after: ")

    assert main(["merge", "--run", str(out), "--out", str(merged)]) == 1
    error = capsys.readouterr().err
    setup, state = reopen(out)
    assert f"{setup.plan.entries[0].path}: {name} is no change of the weight" in error
    assert not merged.exists()
    if name == "PromptTuning":
        assert setup.plan.entries[0].adapter.ids == tuple(setup.subject.tokenizer.encode("the dog"))
    if peft is None:
        return
    assert main(["convert", "--run", str(out), "--out", str(tmp_path / "peft")]) == 0
    plan, adapters = io.load_peft(tmp_path / "peft", setup.base, setup.subject.model)
    batch = next(iter(setup.held_out()))
    want = setup.subject.loss(setup.bound(state), batch, None, False)
    got = setup.subject.loss(flora.bind(setup.base, adapters, plan), batch, None, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
