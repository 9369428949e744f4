"""Prints an experiment's table beside the paper's, draws its plot and checks its claims.

Exit status 1 when a claim of expected.json fails or a run is not finished."""

from __future__ import annotations

import argparse
from pathlib import Path

from flora_jax.launch import catalogue, comparison
from flora_jax.launch.experiment import Experiment
from flora_jax.launch.sweep_command import add_experiment, folder
from flora_jax.launch.table import table

EXAMPLE = "flora table --experiment nola_digits --json results/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--json", metavar="DIR", help="write each run as JSON too (the fields of PEFT's comparison)"
    )


def run(options: argparse.Namespace) -> int:
    catalogue.register_all()
    experiment = Experiment.find(options.experiment)
    out = folder(options, experiment)
    failed = table(experiment, out, extra=options.bindings, search_paths=options.gin_search_paths)
    if options.json:
        runs = experiment.runs(options.bindings, options.gin_search_paths)
        module = experiment.module("table")
        label = getattr(module, "label", None) or (lambda bindings: "run")
        written = comparison.write(experiment, runs, Path(out), Path(options.json), label)
        print(f"written: {len(written)} JSON files in {options.json}")
    return 1 if failed else 0
