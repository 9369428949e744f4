"""One training step against transformers + HF PEFT, same shapes, same machine, same run.

SmolLM2-135M shapes with random float32 weights, an adapter on q and v. The two sides run in
processes of their own and take turns, so that a busy machine slows both; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.launch.peers import METHODS, flops_per_step

EXAMPLE = "flora bench peft --methods lora,dora,oft,miss,vera,loha --settings fast --rounds 3"
NEEDED = ("torch", "transformers", "peft")
# name -> (remat, positions per chunk of the vocabulary loss)
SETTINGS = {"fast": ("dots", None), "lean": ("dots_no_batch", 64), "small": ("full", 32)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=4, help="rows (default 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row (default 128)")
    parser.add_argument(
        "--methods", default="lora", help=f"of {', '.join(METHODS)} (default lora), comma-separated"
    )
    parser.add_argument("--rank", type=int, default=8, help="of LoRA, DoRA, LoHa (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default 2)")
    parser.add_argument(
        "--settings",
        default="fast,lean,small",
        help="of this package: fast (elementwise work recomputed in the backward pass), lean "
        "(attention too, vocabulary loss in chunks), small (whole blocks); default all",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


class Worker:
    """One side in its own process."""

    def __init__(self, side: str, settings: dict[str, Any]):
        command = [sys.executable, "-m", "flora_jax.launch.peers", side, json.dumps(settings)]
        environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError("a benchmark worker ended early; its message is above")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a command and waits for the answer."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.write("quit\n")
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(options: argparse.Namespace, method: str, cache: str) -> Iterator[dict[str, Worker]]:
    """Every side of one method, started one after another."""
    common = {name: getattr(options, name) for name in ("batch", "length", "rank")}
    common["method"] = method
    wanted = {"peft": ("torch", {**common, "remat": "none"})}
    for name in options.settings.split(","):
        if name not in SETTINGS:
            raise ConfigError(unknown("setting", name, SETTINGS))
        remat, chunk = SETTINGS[name]
        settings = {**common, "remat": remat, "chunk": chunk, "cache": f"{cache}/{name}"}
        wanted[f"flora {name}"] = ("jax", settings)
    with contextlib.ExitStack() as stack:
        started = {}
        for name, (side, settings) in wanted.items():
            started[name] = Worker(side, settings)
            stack.callback(started[name].close)
        yield started


def measure(options: argparse.Namespace, method: str) -> dict[str, dict[str, float]]:
    """Medians per side of one method.

    ``cached_first_step_seconds`` comes from a second start of each side, with our compiled
    programs kept from the first.
    """
    with tempfile.TemporaryDirectory() as cache:
        with workers(options, method, cache) as sides:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            rates: dict[str, list[float]] = {name: [] for name in sides}
            peak: dict[str, int] = {}
            for _ in range(options.rounds):
                for name, worker in sides.items():
                    rates[name].append(worker.ask("matmul")["flops_per_second"])
                    answer = worker.ask(f"step {options.steps}")
                    seconds[name] += answer["seconds"]
                    peak[name] = answer["peak_bytes"]
            first = {name: worker.ready["first_step_seconds"] for name, worker in sides.items()}
        with workers(options, method, cache) as again:
            cached = {name: worker.ready["first_step_seconds"] for name, worker in again.items()}
    work = flops_per_step(options.batch, options.length)
    # Both libraries' products on this machine in this run: the better one is the yardstick.
    best = max(statistics.median(values) for values in rates.values())
    return {
        name: {
            "seconds_per_step": statistics.median(times),
            "tokens_per_second": options.batch * options.length / statistics.median(times),
            "peak_bytes": peak[name],
            "first_step_seconds": first[name],
            "cached_first_step_seconds": cached[name],
            "share_of_matmul_rate": work / statistics.median(times) / best,
            "matmul_flops_per_second": statistics.median(rates[name]),
        }
        for name, times in seconds.items()
    }


def table(methods: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown, one row a method and side, ratios against PEFT."""
    head = ["method", "side", "s/step", "tokens/s", "x PEFT", "peak GB", "x PEFT", "first step s"]
    rows = [[*head, "with cache s", "matmul rate"], ["---"] * 10]
    for method, figures in methods.items():
        rows += _rows(method, figures)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rows(method: str, figures: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = []
    peft = figures["peft"]
    for name, f in figures.items():
        rows.append(
            [
                method,
                name,
                f"{f['seconds_per_step']:.3f}",
                f"{f['tokens_per_second']:.0f}",
                f"{f['tokens_per_second'] / peft['tokens_per_second']:.2f}",
                f"{f['peak_bytes'] / 1e9:.2f}",
                f"{f['peak_bytes'] / peft['peak_bytes']:.2f}",
                f"{f['first_step_seconds']:.1f}",
                f"{f['cached_first_step_seconds']:.1f}",
                f"{100 * f['share_of_matmul_rate']:.0f} %",
            ]
        )
    return rows


def run(options: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"needs {', '.join(missing)}: pip install 'flora_jax[interop]'")
    names = options.methods.split(",")
    for name in names:
        if name not in METHODS:
            raise ConfigError(unknown("method", name, METHODS))
    figures = {name: measure(options, name) for name in names}
    print(json.dumps(figures, indent=1) if options.json else table(figures))
    return 0
