"""Converts a checkpoint: a model between hf, gguf and flora; a run's adapter to HF PEFT.

The source is a named model, a folder or a GGUF file, or a run with --run: its adapter as it is
(--to peft, the default) or as a LoRA in PEFT's format (--to lora: any method that merges, cut to
--rank, --energy or --error), the entries of the base that it changed (--to delta, one safetensors
file: few for LIFT) or both merged (the other formats)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flora_jax as flora
from flora_jax import io, quant, training
from flora_jax.core.errors import ConfigError
from flora_jax.launch import native
from flora_jax.launch.merge_command import add_quantized, merged, save
from flora_jax.launch.setup import reopen
from flora_jax.launch.subjects import open_model

EXAMPLE = (
    "flora convert --run runs/kjv --out adapter/\n"
    "  flora convert --run runs/kjv-dora --to lora --rank 16 --out lora/\n"
    "  flora convert smollm2-135m --out smollm2.gguf --to gguf --dtype q8_0"
)
FORMATS = ("hf", "gguf", "flora", "peft", "lora", "delta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", nargs="?", help="a named model, a folder or a GGUF file")
    source.add_argument("--run", metavar="DIR", help="a run folder")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder or file to write")
    parser.add_argument("--to", choices=FORMATS, help="default: peft for a run, else hf")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 ...; for gguf also q8_0, q4_0, q4_1 (default float32)"
    )
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    add_quantized(parser, ("dequantize",))
    add_limits(parser)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """``--rank``, ``--energy``, ``--error``: how much of a change a LoRA keeps."""
    group = parser.add_argument_group("limits of a LoRA")
    group.add_argument("--rank", type=int, help="at most so many components a weight")
    group.add_argument("--energy", type=float, metavar="E", help="keep this share of |dW|^2")
    group.add_argument(
        "--error", type=float, metavar="E", help="stay within this relative Frobenius error"
    )


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_limits` got."""
    return {name: getattr(options, name) for name in ("rank", "energy", "error")}


def run(options: argparse.Namespace) -> int:
    target = Path(options.out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target} exists: choose another --out")
    form = options.to or ("peft" if options.run else "hf")
    if form != "lora" and any(value is not None for value in limits(options).values()):
        raise ConfigError(f"--rank, --energy and --error go with --to lora, not {form}")
    if form in ("peft", "lora"):
        _to_peft(options, target, form)
    elif form == "delta":
        _to_delta(options, target)
    else:
        _convert(options, target, form)
    print(f"{options.run or options.source} -> {target} ({form})")
    return 0


def _convert(options: argparse.Namespace, target: Path, form: str) -> None:
    model, params, tokenizer = _read(options)
    if form == "gguf":
        params = quant.dequantize(params)
        io.save_gguf(target, model, params, tokenizer, dtype=options.dtype or "float32")
        return
    if options.dtype:
        params = training.cast_base(params, options.dtype)
    if form == "flora":
        native.save(target, model, params, tokenizer)
    else:
        save(target, model, quant.dequantize(params), tokenizer)


def _read(options: argparse.Namespace) -> tuple:
    if options.run:
        setup, state = reopen(options.run, options.step)
        return (
            setup.subject.model,
            merged(setup, state, quantized=options.quantized),
            setup.subject.tokenizer,
        )
    return open_model(options.source, "float32", {})


def _run(options: argparse.Namespace) -> tuple:
    if not options.run:
        raise ConfigError(f"{options.source} has no adapter: give a run folder with --run")
    return reopen(options.run, options.step)


def _to_delta(options: argparse.Namespace, target: Path) -> None:
    setup, state = _run(options)
    delta = io.sparse_delta(setup.base, flora.materialize(setup.bound(state)))
    io.save_delta(target, setup.base, delta)
    print(f"{sum(len(e.indices) for e in delta.values()):,} entries of {len(delta)} weights")


def _to_peft(options: argparse.Namespace, target: Path, form: str) -> None:
    setup, state = _run(options)
    subject = setup.subject
    if not hasattr(subject.model, "to_hf"):
        raise ConfigError(f"{subject.name} is not a model that Hugging Face knows")
    adapters, plan = state.adapters, setup.plan
    if form == "lora":
        plan, adapters, report = flora.to_lora(setup.base, adapters, plan, **limits(options))
        print(report.table())
    io.save_peft(
        target,
        adapters,
        plan,
        quant.dequantize(setup.base),
        subject.model,
        base_model=subject.name,
        task_type="CAUSAL_LM" if subject.generates else "SEQ_CLS",
    )
