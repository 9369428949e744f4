"""The byte-level language model: pretrain on one text, adapt to another, what is retained."""

import dataclasses

import jax
import numpy as np
import pytest

from flora_jax.attention import Hedgehog, LinearAttention, Softmax
from flora_jax.cli import main
from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten
from flora_jax.data import SequenceTask
from flora_jax.io.tokenizer import Tokenizer
from flora_jax.launch.first_task import Pretraining
from flora_jax.launch.small_text import SmallLanguageModel
from flora_jax.models import LlamaConfig
from flora_jax.training.run_dir import RunDir

TASK = SequenceTask(length=2, vocab=6)
FEW = Pretraining(data=TASK, steps=2, batch_size=4)


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


def test_converts_what_it_pretrained_and_distils_the_maps_alone(tmp_path, capsys):
    source = SmallLanguageModel(config=LlamaConfig.tiny(), pretraining=FEW)
    plain = source.load(TASK)
    assert plain.model.config.attention == Softmax()
    converted = dataclasses.replace(source, attention=Hedgehog())
    copied = converted.load(TASK)
    distilled = dataclasses.replace(converted, distillation=FEW).load(TASK, tmp_path)
    assert "new     layers/self_attn/attention/q_map" in capsys.readouterr().err
    assert copied.model.config.attention == distilled.model.config.attention == Hedgehog()
    assert distilled.name == "byte-level Llama pretrained on recall of 2, converted to Hedgehog"
    first, start, maps = (flatten(subject.params) for subject in (plain, copied, distilled))
    new = {path for path in maps if "/attention/" in path}
    assert len(new) == 2 and start.keys() == maps.keys() == first.keys() | new
    for path, leaf in first.items():
        np.testing.assert_array_equal(maps[path], leaf, err_msg=path)
    for path in new:
        moved = np.abs(np.asarray(maps[path] - start[path]))
        assert (moved.max(axis=(1, 2, 3)) > 0).all(), "in every layer"
    again = dataclasses.replace(converted, distillation=FEW).load(TASK, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, distilled.params)


def test_only_attention_with_maps_is_distilled():
    with pytest.raises(ConfigError, match="distillation needs an attention"):
        SmallLanguageModel(config=LlamaConfig.tiny(), distillation=FEW)
    with pytest.raises(ConfigError, match="LinearAttention has no maps to distil"):
        SmallLanguageModel(
            config=LlamaConfig.tiny(), attention=LinearAttention(), distillation=FEW
        )
