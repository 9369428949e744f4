"""Shows what a configuration would train, and what XLA says one compiled step costs."""

from __future__ import annotations

import argparse

from flora_jax.launch import arguments, setup
from flora_jax.launch.measure import cost_lines, step_cost
from flora_jax.launch.train import complete

EXAMPLE = "flora plan --gin_file=runs/finetune_lm.gin --gin.adapter=@VeRA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_gin(parser)


def run(options: argparse.Namespace) -> int:
    built = setup.build(complete(arguments.load(options).arguments("train")), abstract=True)
    print(built.table())
    if not options.dry_run:
        print(cost_lines(step_cost(built)))
    return 0
