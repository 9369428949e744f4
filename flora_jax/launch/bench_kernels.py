"""Kernels: what each op costs compiled, and with --measure how long it takes here.

The compiled cost needs no device: each case is compiled for every target whose compiler is
installed (pip install 'flora_jax[aot]'), else for this machine. --measure times the small cases on
a CPU, all of them on a GPU or TPU: calls repeated in one program, each on arguments of its own, so
that no cache holds the weights; the sides take turns, figures are medians.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.kernels import aot, bench_spec, dispatch
from flora_jax.kernels.bench_spec import Case
from flora_jax.kernels.costs import DEVICES, Work

EXAMPLE = "flora bench kernels --ops low_bit_matmul --cases 'w4a16.* M16 .*' --targets tpu_v5e"
HERE = "here"
CACHE = 50 << 20
"""Bytes of the largest last-level cache that arguments are rotated through."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", help=f"of {', '.join(bench_spec.ops())}; default all")
    parser.add_argument("--cases", default=".*", help="regular expression of case names")
    parser.add_argument(
        "--targets",
        help=f"of {', '.join([HERE, *aot.TARGETS])}; default what is installed, else {HERE}",
    )
    parser.add_argument(
        "--device", default="h200", help=f"roofline of {HERE}, one of {', '.join(DEVICES)}"
    )
    parser.add_argument("--measure", action="store_true", help="time the cases on this machine")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default 9)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} must be at least 1")
    if options.device not in DEVICES:
        raise ConfigError(unknown("device", options.device, DEVICES))
    chosen = list(select(options.ops, options.cases))
    if options.measure:
        rows = list(measured(chosen, options.rounds, options.device))
    else:
        rows = list(compiled(chosen, targets(options.targets), options.device))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


def select(ops: str | None, pattern: str) -> Iterator[tuple[str, Case]]:
    """``(op, case)`` of the ops, comma-separated, and of the names that match.

    Raises:
      ConfigError: unknown op, a malformed expression, or nothing matches.
    """
    names = ops.split(",") if ops else bench_spec.ops()
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ConfigError(f"--cases {pattern!r}: {error}") from None
    every = [(op, case) for op in names for case in bench_spec.cases(op)]
    found = [(op, case) for op, case in every if matches(case.name)]
    if not found:
        raise ConfigError(unknown("case", pattern, [case.name for _, case in every]))
    yield from found


def targets(given: str | None) -> list[str]:
    if given is None:
        return [name for name in aot.TARGETS if aot.missing(name) is None] or [HERE]
    for name in given.split(","):
        if name not in (HERE, *aot.TARGETS):
            raise ConfigError(unknown("compilation target", name, [HERE, *aot.TARGETS]))
    return given.split(",")


def passes(case: Case) -> Iterator[tuple[str, Callable[..., Any], Work]]:
    """Forward and, where there is one, the gradient."""
    yield "forward", case.function, case.work
    if case.gradient_work is not None:
        yield "gradient", case.gradient, case.gradient_work


def compiled(
    chosen: list[tuple[str, Case]], names: list[str], device: str
) -> Iterator[dict[str, Any]]:
    """One row a case, pass and target. ``bound_us``: the roofline of the least work;
    ``share``: its part of what the compiled program's own operations and bytes would take.
    ``declared_mbytes``: of a GPU's kernels, in ``mbytes`` beside what else the program moves."""
    for op, case in chosen:
        for direction, function, work in passes(case):
            for name in names:
                row = {"op": op, "case": case.name, "pass": direction, "target": name}
                yield row | cost(function, case.args, work, name, device)


def cost(
    op: Callable[..., Any], args: Any, work: Work, name: str, device: str
) -> dict[str, Any]:
    """What the compiler says of one program."""
    def function(*args: Any) -> Any:
        with dispatch.untried():
            return op(*args)

    if name == HERE:
        executable = jax.jit(function).lower(*args).compile()
        given = executable.cost_analysis() or {}
        flops, moved = given.get("flops", 0.0), given.get("bytes accessed", 0.0)
        temporary, kernels = executable.memory_analysis().temp_size_in_bytes, 0
        declared = None
        peak = DEVICES[device]
    else:
        got = aot.compile(function, *args, target=name)
        flops, moved, temporary = got.flops, got.bytes, got.temporary
        declared = got.kernel_bytes / 1e6 if aot.TARGETS[name].platform == "cuda" else None
        kernels = sum("tpu_custom_call" in k or "mosaic_gpu" in k for k in got.kernels)
        peak = DEVICES[name]
    bound = peak.bound(work)
    program = peak.bound(Work(flops=flops, bytes=moved, unit=work.unit))
    # A loop's body is counted once by some compilers: such a program has no share.
    counted = flops >= 0.9 * work.flops and moved >= 0.9 * work.bytes
    return {
        "kernels": kernels,
        "gflops": flops / 1e9,
        "mbytes": moved / 1e6,
        "declared_mbytes": declared,
        "least_mbytes": work.bytes / 1e6,
        "temporary_mbytes": temporary / 1e6,
        "bound_us": 1e6 * bound,
        "share": bound / program if counted else None,
    }


def measured(
    chosen: list[tuple[str, Case]], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """One row a case, pass and side. ``times_faster``: than the first rival."""
    platform = jax.default_backend()
    if platform == "cpu":
        chosen = [(op, case) for op, case in chosen if case.small]
        if not chosen:
            raise ConfigError("--measure on a CPU: none of the cases is small enough")
    for op, case in chosen:
        for direction, function, work in passes(case):
            with dispatch.untried():
                seconds = times(sides(case, direction, function), rounds)
            first = next((seconds[name] for name in case.rivals), None)
            for name, value in seconds.items():
                yield {
                    "op": op,
                    "case": case.name,
                    "pass": direction,
                    "platform": platform,
                    "side": name,
                    "us": 1e6 * value,
                    "times_faster": None if first is None else first / value,
                    "share": None if platform == "cpu" else DEVICES[device].bound(work) / value,
                }


def sides(case: Case, direction: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Calls of the op and of its rivals, each with the number of repetitions in it."""
    runs = [" ".join(dispatch.chosen(None) or ("dispatched",)), *case.rivals]
    pairs = [(function, case.inputs)]
    for rival in case.rivals.values():
        f = case.rival_gradient(rival) if direction == "gradient" else rival.function
        pairs.append((f, lambda key, args=rival.args: bench_spec.draw(args, key)))
    return {name: repeated(*pair) for name, pair in zip(runs, pairs)}


def repeated(
    function: Callable[..., Any], inputs: Callable[[jax.Array], Any]
) -> tuple[Callable[[], Any], int]:
    """One program of several calls, and how many: at least 4, on an accelerator enough that their
    arguments fill the cache four times over, 32 at most."""
    first = inputs(jax.random.key(0))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(first))
    count = 4
    if jax.default_backend() != "cpu":
        count = min(32, max(4, math.ceil(4 * CACHE / size)))
    copies = [first, *(inputs(jax.random.key(n)) for n in range(1, count))]
    program = jax.jit(lambda copies: [function(*args) for args in copies])
    return lambda: program(copies), count


def times(sides: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each side; the first turn, which compiles, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, (call, count) in sides.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append((time.perf_counter() - started) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, (float, np.floating)) else str(value)
