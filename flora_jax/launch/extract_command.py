"""Extracts a LoRA from two checkpoints, the base and a tuned one, and saves it in PEFT's format.

Prints rank and relative error of every weight. The base may be in low bits: the LoRA then makes up
for their rounding too."""

from __future__ import annotations

import argparse
from pathlib import Path

import flora_jax as flora
from flora_jax import io, quant
from flora_jax.core.errors import ConfigError
from flora_jax.launch.convert_command import add_limits, limits
from flora_jax.launch.subjects import open_model

EXAMPLE = "flora extract --base smollm2-135m --tuned runs/kjv/merged --error 0.05 --out lora/"
RULE = r"(.*/)?layers/.*/kernel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a named model, a folder or a GGUF file"
    parser.add_argument("--base", required=True, metavar="MODEL", help=what)
    parser.add_argument("--tuned", required=True, metavar="MODEL", help=what)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--rule",
        action="append",
        metavar="REGEX",
        help="paths that get a LoRA; repeat it (default: every kernel of a repeated block)",
    )
    parser.add_argument(
        "--others",
        choices=("error", "replace", "ignore"),
        default="error",
        help="leaves that differ and match no rule: an error (default), kept whole, or left out",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    target = Path(options.out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target} exists: choose another --out")
    model, base, _ = open_model(options.base, "float32", {})
    _, tuned, _ = open_model(options.tuned, "float32", {})
    if not hasattr(model, "to_hf"):
        raise ConfigError(f"{options.base} is not a model that Hugging Face knows")
    rules = options.rule or [RULE]
    plan, adapters, report = flora.extract_lora(
        base, tuned, rules, others=options.others, **limits(options)
    )
    print(report.table())
    io.save_peft(target, adapters, plan, quant.dequantize(base), model, base_model=options.base)
    print(f"{options.tuned} - {options.base} -> {target}")
    return 0
