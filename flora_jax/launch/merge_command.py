"""Folds a run's adapter into its base and saves the model.

A model that Hugging Face knows becomes a folder that transformers loads (safetensors, config.json,
tokenizer.json); another one becomes a safetensors file of our paths."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

import flora_jax as flora
from flora_jax import io, quant, training
from flora_jax.core.errors import FormatError
from flora_jax.core.paths import flatten
from flora_jax.io import safetensors
from flora_jax.launch.eval_command import add_run
from flora_jax.launch.setup import Setup, reopen

EXAMPLE = "flora merge --run runs/kjv --out runs/kjv/merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--dtype", help="of the weights, e.g. bfloat16 (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are there")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if not options.overwrite and any(out.glob("model*.safetensors")):
        raise FormatError(f"{out} already holds a model; add --overwrite or choose another folder")
    setup, state = reopen(options.run, options.step)
    params = merged(setup, state, options.dtype)
    save(out, setup.subject.model, params, setup.subject.tokenizer, options.overwrite)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(f"{out}: {len(flatten(params))} weights, {size / 2**20:.1f} MiB")
    return 0


def merged(setup: Setup, state: training.TrainState, dtype: str | None = None) -> dict:
    """Plain arrays of the adapted model."""
    params = flora.materialize(setup.bound(state), quantized="dequantize")
    params = quant.dequantize(params)
    return training.cast_base(params, dtype) if dtype else params


def save(out: Path, model, params, tokenizer, overwrite: bool = False) -> None:
    """A Hugging Face folder, or ``model.safetensors`` of our paths for a model it does not know."""
    if hasattr(model, "to_hf"):
        io.save_hf(out, model, params, overwrite=overwrite)
        if tokenizer is not None:
            tokenizer.save(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    safetensors.save_one(out / "model.safetensors", jax.device_get(flatten(params)))
