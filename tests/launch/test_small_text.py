"""The byte-level language model: pretrain on one text, adapt to another, what is retained."""

import numpy as np

from flora_jax.cli import main
from flora_jax.io.tokenizer import Tokenizer
from flora_jax.training.run_dir import RunDir


def test_bytes_round_trip():
    tokenizer = Tokenizer.byte_level()
    text = "naïve 中文\n\ttabs <|endoftext|>"
    ids = tokenizer.encode("naïve 中文\n\ttabs ")
    assert len(ids) == len("naïve 中文\n\ttabs ".encode()) and max(ids) < 256
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.eos_id == 256


def test_adapts_and_measures_forgetting(tmp_path, capsys):
    words = [
        "train",
        "--gin_file=runs/finetune_bytes.gin",
        "--gin.Pretraining.steps=30",
        "--gin.pretraining/TextData.max_documents=8",
        "--gin.TextData.max_documents=12",
        "--gin.steps=20",
        "--gin.train.eval_batches=2",
        "--gin.train.log_every=10",
        "--gin.train.loss_at=(10,)",
        "--gin.train.measure=True",
        f"--out={tmp_path}",
    ]
    assert main(words) == 0
    result = RunDir(tmp_path).status()["result"]
    assert result["perplexity"] < result["perplexity_before"] < 257
    assert 0 < result["retention"] <= 100 and np.isfinite(result["forgetting"])
    assert result["loss_at_10"] == RunDir(tmp_path).metrics()[0]["loss"]
    assert result["peak_bytes"] > result["temp_bytes"] > 0
    assert "retention:" in capsys.readouterr().out
    assert main(["eval", "--run", str(tmp_path)]) == 0
    assert f"perplexity {result['perplexity']:.6g}" in capsys.readouterr().out
