"""Converts a checkpoint: a model between hf, gguf and flora; a run's adapter to HF PEFT.

The source is a named model, a folder, a GGUF file or a run folder (its adapter merged in, except
with --to peft)."""

from __future__ import annotations

import argparse
from pathlib import Path

from flora_jax import io, quant, training
from flora_jax.core.errors import ConfigError
from flora_jax.launch import native
from flora_jax.launch.merge_command import merged, save
from flora_jax.launch.setup import reopen
from flora_jax.launch.subjects import open_model
from flora_jax.training.run_dir import RunDir

EXAMPLE = "flora convert smollm2-135m smollm2.gguf --to gguf --dtype q8_0"
FORMATS = ("hf", "gguf", "flora", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a named model, a folder, a GGUF file or a run folder")
    parser.add_argument("target", help="the folder or file to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 ...; for gguf also q8_0, q4_0, q4_1 (default float32)"
    )
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")


def run(options: argparse.Namespace) -> int:
    target = Path(options.target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target} exists: choose another target")
    if options.to == "peft":
        _to_peft(options, target)
    else:
        _convert(options, target)
    print(f"{options.source} -> {target} ({options.to})")
    return 0


def _convert(options: argparse.Namespace, target: Path) -> None:
    model, params, tokenizer = _read(options)
    if options.to == "gguf":
        params = quant.dequantize(params)
        io.save_gguf(target, model, params, tokenizer, dtype=options.dtype or "float32")
        return
    if options.dtype:
        params = training.cast_base(params, options.dtype)
    if options.to == "flora":
        native.save(target, model, params, tokenizer)
    else:
        save(target, model, quant.dequantize(params), tokenizer)


def _read(options: argparse.Namespace) -> tuple:
    if RunDir(Path(options.source)).status():
        setup, state = reopen(options.source, options.step)
        return setup.subject.model, merged(setup, state), setup.subject.tokenizer
    return open_model(options.source, "float32", {})


def _to_peft(options: argparse.Namespace, target: Path) -> None:
    if not RunDir(Path(options.source)).status():
        raise ConfigError(f"{options.source} is not a run folder: only a run has an adapter")
    setup, state = reopen(options.source, options.step)
    subject = setup.subject
    if not hasattr(subject.model, "to_hf"):
        raise ConfigError(f"{subject.name} is not a model that Hugging Face knows")
    io.save_peft(
        target,
        state.adapters,
        setup.plan,
        quant.dequantize(setup.base),
        subject.model,
        base_model=subject.name,
        task_type="CAUSAL_LM" if subject.generates else "SEQ_CLS",
    )
