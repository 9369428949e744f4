"""Folds a run's adapter into its base and saves the model.

A model that Hugging Face knows becomes a folder that transformers loads (safetensors, config.json,
tokenizer.json); another one becomes a safetensors file of our paths. On a low-bit base you say what
becomes of the merged weights: --quantized dequantize makes the whole model dense; --quantized
requantize rounds them to the base's formats again, keeps the other leaves as they are, writes our
own format and prints what the rounding costs."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

import flora_jax as flora
from flora_jax import io, quant, training
from flora_jax.core.errors import ConfigError, FormatError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import flatten
from flora_jax.io import safetensors
from flora_jax.launch import native
from flora_jax.launch.eval_command import add_run
from flora_jax.launch.setup import Setup, reopen

EXAMPLE = (
    "flora merge --run runs/kjv --out runs/kjv/merged\n"
    "  flora merge --run runs/kjv-int4 --out merged --quantized requantize"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--dtype", help="of the weights, e.g. bfloat16 (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are there")
    add_quantized(parser, ("dequantize", "requantize"))


def add_quantized(parser: argparse.ArgumentParser, choices: tuple[str, ...]) -> None:
    """``--quantized``: what becomes of a low-bit base."""
    parser.add_argument(
        "--quantized",
        choices=choices,
        help="what a low-bit base becomes; there is no default: rounding again costs accuracy, "
        "dense weights cost memory",
    )


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if not options.overwrite and any(out.glob("model*.safetensors")):
        raise FormatError(f"{out} already holds a model; add --overwrite or choose another folder")
    setup, state = reopen(options.run, options.step)
    if options.quantized == "requantize":
        params = _requantized(setup, state, out, options)
    else:
        params = merged(setup, state, options.dtype, quantized=options.quantized)
        save(out, setup.subject.model, params, setup.subject.tokenizer, options.overwrite)
    leaves = flatten(params, is_leaf=is_leaf)
    size = sum(x.nbytes for x in leaves.values())
    print(f"{out}: {len(leaves)} weights, {size / 2**20:.1f} MiB")
    return 0


def low_bit(setup: Setup) -> list[str]:
    """The paths of the base's low-bit weights."""
    return [path for path, x in flatten(setup.base, is_leaf=is_leaf).items() if is_leaf(x)]


def merged(
    setup: Setup,
    state: training.TrainState,
    dtype: str | None = None,
    *,
    quantized: str | None = None,
) -> dict:
    """Plain arrays of the adapted model.

    Raises:
      ConfigError: the base is low-bit and nobody said that it is to become dense.
    """
    low = low_bit(setup)
    if low and quantized != "dequantize":
        raise ConfigError(
            f"the base has {len(low)} low-bit weights ({low[0]} ...): add --quantized dequantize "
            "for a dense model (flora merge also knows --quantized requantize)"
        )
    bound = setup.subject.own(setup.bound(state))
    params = flora.materialize(bound, quantized="dequantize")
    params = quant.dequantize(params)
    return training.cast_base(params, dtype) if dtype else params


def _requantized(
    setup: Setup, state: training.TrainState, out: Path, options: argparse.Namespace
) -> dict:
    """Merges into the base's own formats, prints the table of errors, saves in our format."""
    if not low_bit(setup):
        raise ConfigError("the base has no low-bit weights: leave --quantized away")
    if options.dtype or options.overwrite:
        raise ConfigError(
            "--quantized requantize keeps the base's formats, in a new folder: no "
            "--dtype, no --overwrite"
        )
    bound = setup.subject.own(setup.bound(state))
    params, report = flora.requantize(bound, original=_original(setup))
    native.save(out, setup.subject.model, params, setup.subject.tokenizer)
    print(report.table())
    return params


def _original(setup: Setup) -> dict | None:
    """The weights that the run quantised; None if its model came in low bits."""
    if not setup.options["quantize"]:
        return None
    params = setup.options["model"].load(setup.options["data"]).params
    dtype = setup.options["base_dtype"]
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
