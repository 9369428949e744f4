"""Runs a benchmark by name: every module ``flora_jax.launch.bench_NAME``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil

from flora_jax import launch
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.launch import arguments

EXAMPLE = "flora bench step --gin_file=runs/finetune_lm.gin --steps 10"
PREFIX = "bench_"


def benchmarks() -> list[str]:
    """The names there are. A benchmark has ``add_arguments(parser)``, ``run(options)``, EXAMPLE."""
    names = [module.name for module in pkgutil.iter_modules(launch.__path__)]
    names = [n.removeprefix(PREFIX) for n in names if n.startswith(PREFIX)]
    return sorted(set(names) - {"command"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="one of: " + ", ".join(benchmarks()))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own options; see NAME --help")


def run(options: argparse.Namespace) -> int:
    if options.name not in benchmarks():
        raise ConfigError(unknown("benchmark", options.name, benchmarks()))
    module = importlib.import_module(f"flora_jax.launch.{PREFIX}{options.name}")
    chosen = arguments.parser(f"bench {options.name}", module).parse_args(options.rest)
    chosen.bindings = options.bindings
    return module.run(chosen) or 0
