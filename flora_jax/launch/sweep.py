"""``flora sweep``: every run of an experiment on this machine; finished runs are skipped.

Runs live in ``<out>/<run id>/``. A run is finished when its ``status.json`` says so, so a killed
sweep continues when launched again; a failed run is tried again. Worker processes are kept from
run to run, and what one compiled serves all: runs that differ in a seed compile once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import rich.console
import rich.live
import rich.table

from flora_jax.launch.execute import execute, finished, one_line
from flora_jax.launch.experiment import Experiment, Run
from flora_jax.training.run_dir import RunDir, write_text

STYLE = {"done": "green", "running": "yellow", "failed": "red", "waiting": "dim"}
GRACE = 60.0
"""Seconds that a run has to save itself when its sweep has died."""


def _start_worker(folder: str) -> None:
    """What a worker compiles is kept in a folder of all workers, unless one is set already.

    It ends with the sweep: one that was killed would leave runs that nobody waits for.
    """
    import jax  # the worker is a fresh process

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    # A training run saves itself, anything else ends here; a worker without work would wait.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def run_one(
    experiment: str, arguments: Sequence[str], search_paths: Sequence[str], out: str
) -> str | None:
    """One run, in a worker process; returns None or what went wrong, on one line.

    What it prints goes to ``log.txt`` of its folder.
    """
    from flora_jax.launch import catalogue  # the worker is a fresh process

    with open(Path(out) / "log.txt", "a", buffering=1) as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                catalogue.register_all()
                found = Experiment.find(experiment)
                loaded = found.load(arguments, search_paths)
                command = ["flora", "sweep", f"--experiment={found.name}"]
                execute(loaded, found.entry, out, [*command, *(f"--gin.{a}" for a in arguments)])
        except Exception as error:
            return one_line(error)
    return None


def sweep(
    experiment: Experiment,
    out: str | Path,
    *,
    jobs: int = 1,
    extra: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    limit: int | None = None,
) -> int:
    """Runs what is not finished; returns how many runs failed.

    Args:
      experiment: the experiment.
      out: the folder of its run folders.
      jobs: runs at a time, each in its own process.
      extra: bindings laid over each run.
      search_paths: more folders for gin files.
      limit: at most so many runs now.
    """
    out = Path(out)
    runs = experiment.runs(extra, search_paths)
    waiting = [run for run in runs if not finished(RunDir(out / run.id).status())][:limit]
    console = rich.console.Console()
    console.print(f"{experiment.name}: {len(runs)} runs, {len(waiting)} to do, folder {out}")
    for run in waiting:
        (out / run.id).mkdir(parents=True, exist_ok=True)
        write_text(out / run.id / "bindings.json", json.dumps(run.bindings, indent=1) + "\n")
    if not waiting:
        return 0
    errors: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="flora-compiled-") as compiled,
        concurrent.futures.ProcessPoolExecutor(
            min(jobs, len(waiting)), context, _start_worker, (compiled,)
        ) as pool,
    ):
        tasks = {
            pool.submit(
                run_one,
                str(experiment.path),
                run.arguments,
                tuple(search_paths),
                str(out / run.id),
            ): run
            for run in waiting
        }
        try:
            _watch(tasks, runs, out, errors, console)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            console.print("stopped; the same command continues")
            raise
    for run_id, error in errors.items():
        console.print(f"[red]failed[/red] {out / run_id}: {error}", highlight=False)
    return len(errors)


def _watch(
    tasks: dict[concurrent.futures.Future, Run],
    runs: list[Run],
    out: Path,
    errors: dict[str, str],
    console: rich.console.Console,
) -> None:
    """Follows the runs: a live table on a terminal, one line a finished run elsewhere."""
    pending = set(tasks)
    with rich.live.Live(console=console, auto_refresh=False) as live:
        while pending:
            ended, pending = concurrent.futures.wait(
                pending, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for task in ended:
                run = tasks[task]
                try:
                    error = task.result()
                except BrokenProcessPool:
                    error = "the worker process died (out of memory?)"
                    RunDir(out / run.id).write_status(state="failed", error=error)
                if error:
                    errors[run.id] = error
                if not console.is_terminal:
                    console.print(f"{'failed' if error else 'done'} {run.id} {_label(run)}")
            if console.is_terminal:
                live.update(_live_table(runs, out), refresh=True)


def _label(run: Run) -> str:
    return ", ".join(f"{key}={value}" for key, value in run.bindings.items())


def _live_table(runs: list[Run], out: Path) -> rich.table.Table:
    table = rich.table.Table("run", "bindings", "state", "step", "seconds", "result")
    for run in runs:
        status: dict[str, Any] = RunDir(out / run.id).status()
        state = status.get("state", "waiting")
        state = "waiting" if state == "created" else state
        ended = status.get("updated") if state in ("done", "failed") else time.time()
        started = status.get("started")
        step = f"{status['step']}/{status['steps']}" if "steps" in status else ""
        table.add_row(
            run.id,
            _label(run),
            f"[{STYLE.get(state, '')}]{state}" if state in STYLE else state,
            step,
            f"{ended - started:.0f}" if started else "",
            _brief(status.get("result", {})),
        )
    return table


def _brief(result: dict[str, Any]) -> str:
    numbers = {k: v for k, v in result.items() if isinstance(v, (int, float))}
    return " ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:3])
