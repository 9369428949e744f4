"""Several members trained in one program against the same runs one after another.

Both sides train the same members on the same batches in one process, taking turns; the runs one
after another share one compiled step."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flora_jax import training
from flora_jax.core.errors import ConfigError
from flora_jax.launch import arguments, setup
from flora_jax.launch.train import complete

EXAMPLE = "flora bench members --gin_file=runs/finetune_image.gin --members 8 --steps 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_gin(parser)
    parser.add_argument("--members", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--chunk", type=int, default=0, help="members batched together (0: auto)")
    parser.add_argument("--steps", type=int, default=100, help="of each member in a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each side, alternating")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    if min(options.members, options.steps, options.rounds) < 1:
        raise ConfigError("--members, --steps and --rounds must be at least 1")
    built = setup.build(complete(arguments.load(options).arguments("train")))
    if built.mesh is not None:
        raise ConfigError("bench members measures one device: leave train.mesh out")
    members = training.Members(seeds=tuple(range(options.members)), chunk=options.chunk)
    figures = measure(built, members, options.steps, options.rounds)
    if options.json:
        print(json.dumps(figures, indent=1))
        return 0
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}")
    return 0


def measure(
    built: setup.Setup, members: training.Members, steps: int, rounds: int
) -> dict[str, float]:
    """Median seconds of a round of each side, their ratio, and the seconds that compiling took."""
    optimizer = built.options["optimizer"]
    chosen = {name: built.options[name] for name in ("accumulate", "clip")}
    count = len(members)
    problem = (built.subject.loss, built.plan, optimizer)
    one = training.make_step(*problem, **chosen)
    many = training.make_members_step(*problem, members, **chosen)
    batches = [batch for _, batch in zip(range(steps), built.batches(), strict=False)]
    seeds = members.seeds
    alone = [training.fresh_state(built.plan, built.base, optimizer, seed) for seed in seeds]
    together = members.states(built.plan, built.base, optimizer)
    losses: dict[str, Any] = {}

    def one_after_another(batches: list[Any]) -> None:
        ends = []
        for i in range(count):
            for batch in batches:
                alone[i], metrics = one(alone[i], built.base, batch)
            ends.append(metrics["loss"])
            jax.block_until_ready(alone[i])
        losses["alone"] = np.array(ends)

    def at_once(batches: list[Any]) -> None:
        nonlocal together
        for batch in batches:
            together, metrics = many(together, built.base, batch)
        losses["together"] = np.asarray(jax.block_until_ready(metrics["loss"]))

    first = {"alone": _timed(one_after_another, batches[:1])}
    first["together"] = _timed(at_once, batches[:1])
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(rounds):
        seconds["alone"].append(_timed(one_after_another, batches))
        seconds["together"].append(_timed(at_once, batches))
    alone_s, together_s = (statistics.median(seconds[side]) for side in ("alone", "together"))
    step_s = {"alone": alone_s / len(batches), "together": together_s / len(batches)}
    compile_s = {side: first[side] - step_s[side] for side in first}
    return {
        "members": count,
        "steps": len(batches),
        "alone_seconds": alone_s,
        "together_seconds": together_s,
        "times_faster": alone_s / together_s,
        "alone_compile_seconds": compile_s["alone"],
        "together_compile_seconds": compile_s["together"],
        "times_faster_compiled_in": (alone_s + compile_s["alone"])
        / (together_s + compile_s["together"]),
        "largest_loss_difference": float(np.abs(losses["alone"] - losses["together"]).max()),
    }


def _timed(f: Callable[[list[Any]], None], batches: list[Any]) -> float:
    started = time.perf_counter()
    f(batches)
    return time.perf_counter() - started
