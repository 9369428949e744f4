"""Judges a trained run on its held-out data again, from the run folder alone."""

from __future__ import annotations

import argparse
import json

from flora_jax.launch.setup import reopen

EXAMPLE = "flora eval --run runs/kjv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--base", action="store_true", help="judge the model without adapters too")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The options that name a run and one of its checkpoints."""
    parser.add_argument("--run", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")


def run(options: argparse.Namespace) -> int:
    setup, state = reopen(options.run, options.step)
    found = {f"step {int(state.step)}": setup.judge(state)}
    if options.base:
        found["base"] = setup.judge_base()
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in figures.items()))
    return 0
