"""Times the compiled training step of a configuration: milliseconds, tokens/s, XLA's memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import jax

from flora_jax import training
from flora_jax.launch import arguments, setup
from flora_jax.launch.measure import step_cost
from flora_jax.launch.train import complete

EXAMPLE = "flora bench step --gin_file=runs/finetune_lm.gin --gin.adapter=@DoRA --steps 10"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_gin(parser)
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    built = setup.build(complete(arguments.load(options).arguments("train")))
    figures = measure(built, options.steps)
    if options.json:
        print(json.dumps(figures, indent=1))
        return 0
    for name, value in figures.items():
        print(f"{name:20} {value:,.4g}")
    return 0


def measure(built: setup.Setup, steps: int) -> dict[str, float]:
    """Median time of a step after the compiling one."""
    chosen = {name: built.options[name] for name in ("accumulate", "clip")}
    step = training.make_step(built.subject.loss, built.plan, built.options["optimizer"], **chosen)
    # the step donates its state: what it costs is found from the shapes
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    shaped = dataclasses.replace(built, state=jax.tree.map(like, built.state))
    batches = iter(built.batches())
    batch, state = next(batches), built.state
    size = batch["tokens"].size if built.subject.generates else len(batch["weight"])
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, metrics = step(state, built.base, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - started)
        batch = next(batches)
    median = statistics.median(times[1:])
    cost = step_cost(shaped)
    unit = "tokens_per_s" if built.subject.generates else "examples_per_s"
    return {
        "milliseconds": 1e3 * median,
        unit: size / median,
        "first_seconds": times[0],
        "trained": sum(built.trained().values()),
        "flops": cost["flops"],
        "peak_bytes": cost["peak_bytes"],
        "temp_bytes": cost["temp_bytes"],
    }
