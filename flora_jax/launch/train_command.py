"""Adapts a model to data: prints the plan, the figures and a sample before and after.

The run folder holds what is needed to reload it. A run that was stopped continues when the same
command is given again."""

from __future__ import annotations

import argparse
from pathlib import Path

from flora_jax.launch import arguments, setup
from flora_jax.launch.execute import execute
from flora_jax.launch.train import complete

EXAMPLE = "flora train --gin_file=runs/finetune_lm.gin --gin.adapter=@DoRA() --gin.train.steps=50"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_gin(parser)
    parser.add_argument("--out", help="the run folder (default: train.out, or runs/train-HASH)")


def run(options: argparse.Namespace) -> int:
    config = arguments.load(options)
    if options.dry_run:
        kwargs = config.arguments("train")
        print(config.operative())
        folder = options.out and Path(options.out)
        print(setup.build(complete(kwargs), folder, abstract=True).table())
        return 0
    execute(config, "train", options.out)
    return 0
