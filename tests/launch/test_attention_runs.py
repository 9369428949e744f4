"""Hedgehog's two stages from the command line: maps, merge, LoRA, generation."""

import json

import numpy as np

from flora_jax import attention
from flora_jax.cli import main
from flora_jax.core.paths import flatten
from flora_jax.launch.setup import reopen
from flora_jax.training.run_dir import RunDir


def test_maps_then_lora(tiny, tmp_path, capsys):
    maps, merged, tuned = (tmp_path / name for name in ("maps", "merged", "tuned"))
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", "--gin.train.sample_tokens=2"]
    stage = [
        "--gin.LanguageModel.attention=@Distil",
        "--gin.train.rules={'layers/self_attn/attention/.*': @Replace()}",
        f"--out={maps}",
    ]
    assert main([*words, *stage]) == 0
    assert "new     layers/self_attn/attention/q_map" in capsys.readouterr().err
    result = RunDir(maps).status()["result"]
    assert 0 < result["xent"] < result["xent_before"] and "perplexity" not in result
    assert result["trained"] == 2 * 2 * 4 * 16 * 16
    setup, _ = reopen(maps)
    base = {p: x for p, x in flatten(setup.base).items() if "/attention/" not in p}

    assert main(["merge", "--run", str(maps), "--out", str(merged)]) == 0
    data = json.loads((merged / "config.json").read_text())
    assert data["flora_attention"]["student"]["method"] == "Hedgehog"

    stage = [
        f"--gin.LanguageModel.source={merged}",
        "--gin.LanguageModel.attention=@Hedgehog",
        f"--out={tuned}",
    ]
    assert main([*words, *stage]) == 0
    assert " leaves copied\n" in capsys.readouterr().err, "the learnt maps are there"
    setup, state = reopen(tuned)
    assert setup.subject.model.config.attention == attention.Hedgehog()
    flat = flatten(setup.base)
    for path, leaf in base.items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg="stage one moves the maps alone")
    assert not np.allclose(flat["layers/self_attn/attention/q_map"][0, 0], np.eye(16))
    result = RunDir(tuned).status()["result"]
    assert result["perplexity"] < result["perplexity_before"]
    capsys.readouterr()
    assert main(["generate", "--run", str(tuned), "--prompt", "the", "--max_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the")
