"""What a wrong command line gets: one line that names the place, the value, the nearest choice."""

import subprocess
import sys

import pytest

from flora_jax.cli import COMMANDS, main


def error(capsys, *words):
    assert main(list(words)) == 1
    text = capsys.readouterr().err
    assert text.startswith("flora: error: ") and text.count("\n") == 1, text
    return text.removeprefix("flora: error: ").strip()


@pytest.fixture
def train(tiny, tmp_path, capsys):
    """Runs ``flora train`` on the tiny decoder with bindings; gives the error, nothing written."""

    def call(*bindings):
        out = tmp_path / "out"
        words = [f"--gin.{binding}" for binding in bindings]
        text = error(capsys, "train", f"--gin_file={tiny / 'lm.gin'}", f"--out={out}", *words)
        assert not (out / "checkpoints").exists()
        return text

    return call


def test_unknown_method(train):
    assert train("adapter=@LORA") == (
        "--gin.adapter=@LORA: unknown name '@LORA'; nearest: @LoRA, @VLoRA, @OLoRA"
    )


def test_misspelt_key(train):
    assert "unknown parameter of LoRA 'rnk'; nearest: rank" in train("LoRA.rnk=2")
    assert "unknown parameter of train 'step'; nearest: steps" in train("train.step=2")
    assert "unknown macro 'adaptor'; nearest: adapter" in train("adaptor=@LoRA")


def test_wrong_type(train):
    assert train("LoRA.rank=eight") == "LoRA.rank = 'eight': expected int, got str"
    assert "train.model = 'smollm2-135m': expected Source, got str" in train(
        "train.model=smollm2-135m", "train.steps=1"
    )
    text = train("adapter=LoRA")
    assert "lm.gin:9: train.rules = {" in text
    assert text.endswith(
        "expected Mapping[str, Adapter or None], got dict with 'LoRA'; an object is written @LoRA()"
    )


def test_unused_binding(train):
    text = train("DoRA.rank=2")
    assert text.startswith("--gin.DoRA.rank=2: nothing uses DoRA.rank; used are AdamW, ")


def test_undefined_macro(train):
    text = train("train.rules={'.*': %adaptr}")
    assert "unknown macro '%adaptr'; nearest: %adapter" in text


def test_unmatched_rule(train):
    text = train("train.rules={'layers/attn/q_proj/kernel': @LoRA()}")
    assert text.startswith("rule 'layers/attn/q_proj/kernel' matches nothing; nearest paths: ")
    assert "layers/self_attn/q_proj/kernel" in text
    assert "train.rules gives no weight an adapter" in train("train.rules={}")


def test_a_folder_of_a_run_that_never_started_is_free_again(tiny, tmp_path, capsys):
    words = ["train", f"--gin_file={tiny / 'lm.gin'}", f"--out={tmp_path}"]
    assert "outside 1..64" in error(capsys, *words, "--gin.LoRA.rank=99")
    assert main([*words, "--gin.train.steps=1"]) == 0
    capsys.readouterr()
    assert "already holds another run" in error(capsys, *words, "--gin.train.steps=2")


def test_rank_too_large(train):
    text = train("LoRA.rank=4096")
    assert text.startswith("layers/self_attn/q_proj/kernel: rank=4096 is outside 1..64")


def test_mesh_that_does_not_divide(train):
    import jax

    text = train(f"train.mesh={{'data': {jax.device_count() + 1}}}")
    assert "does not divide the" in text


def test_missing_files(capsys, tmp_path):
    text = error(capsys, "train", "--gin_file=runs/finetune_ml.gin")
    assert text.startswith("unknown gin file 'runs/finetune_ml.gin'; nearest: runs/finetune_lm.gin")
    assert "is not a run folder" in error(capsys, "eval", "--run", str(tmp_path))
    assert "unknown command 'trian'; nearest: train" in error(capsys, "trian")


def test_no_such_checkpoint(capsys, trained):
    text = error(capsys, "eval", "--run", str(trained), "--step", "7")
    assert "no checkpoint of step 7" in text and "there are: 4" in text


def test_a_run_whose_base_changed_is_refused(capsys, trained, tiny, tmp_path):
    import shutil

    from flora_jax import io, training

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    model, params = io.load_hf(tiny / "model")
    io.save_hf(tmp_path / "other", model, training.cast_base(params, "bfloat16"))
    shutil.copy(tiny / "model" / "tokenizer.json", tmp_path / "other")
    shutil.copy(tiny / "model" / "tokenizer_config.json", tmp_path / "other")
    config = (copy / "config.gin").read_text()
    (copy / "config.gin").write_text(config.replace(str(tiny / "model"), str(tmp_path / "other")))
    assert "checkpoint of another base" in error(capsys, "eval", "--run", str(copy))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: flora {command}" in text and f"example:\n  flora {command}" in text


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flora_jax 0.")
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_python_dash_m():
    words = [sys.executable, "-m", "flora_jax", "methods", "--family", "adapter"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "2106.09685" in done.stdout and done.stdout.startswith("family")
