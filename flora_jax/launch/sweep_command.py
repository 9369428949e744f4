"""Runs every run of an experiment that is not finished, on this machine.

A killed sweep continues when the same command is given again."""

from __future__ import annotations

import argparse

from flora_jax.launch import arguments, catalogue
from flora_jax.launch.experiment import Experiment
from flora_jax.launch.sweep import sweep

EXAMPLE = "flora sweep --experiment nola_digits --jobs 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--limit", type=int, help="start at most so many runs now")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and stop")


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """The options by which ``sweep`` and ``table`` find an experiment and its runs."""
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="a folder of experiments/, or a path"
    )
    parser.add_argument("--out", help="folder of the run folders (default runs/NAME)")
    parser.add_argument(
        "--gin.NAME=VALUE", dest="_", action="store_true", help="a binding laid over every run"
    )
    arguments.add_search_paths(parser)


def folder(options: argparse.Namespace, experiment: Experiment) -> str:
    """Where the run folders are."""
    return options.out or f"runs/{experiment.name}"


def run(options: argparse.Namespace) -> int:
    catalogue.register_all()
    experiment = Experiment.find(options.experiment)
    if options.dry_run:
        for one in experiment.runs(options.bindings, options.gin_search_paths):
            print(one.id, " ".join(f"--gin.{argument}" for argument in one.arguments))
        return 0
    failed = sweep(
        experiment,
        folder(options, experiment),
        jobs=options.jobs,
        extra=options.bindings,
        search_paths=options.gin_search_paths,
        limit=options.limit,
    )
    return 1 if failed else 0
