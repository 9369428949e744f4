"""Runs an entry point in a run folder that says what was run, with what, and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flora_jax.config import Config
from flora_jax.core.errors import ConfigError, FloraError, unknown
from flora_jax.launch import bindings
from flora_jax.training.run_dir import RunDir, write_text

PACKAGES = (
    "flora_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "gin-config",
    "numpy",
    "ml_dtypes",
    "safetensors",
)
WRITTEN = (
    "status.json",
    "config.gin",
    "operative.gin",
    "environment.json",
    "error.txt",
    "plan.txt",
    "plan.json",
    "base.safetensors",
)


class Preempted(FloraError):
    """A run was asked to stop and saved itself; the same command continues it."""


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to run it again: versions, devices, commit, command line."""
    devices = jax.devices()
    return {
        "argv": list(argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "backend": jax.default_backend(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind},
        "processes": jax.process_count(),
        "git": _git(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the source tree the package runs from; None where it is installed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def run_hash(config: Config, entry: str) -> str:
    """What tells two runs apart: their bindings without the folder they go to."""
    return config.hash(exclude=[f"{entry}.out"])


def prepare(config: Config, entry: str, out: str | Path, argv: Sequence[str]) -> RunDir:
    """Claims the folder and writes ``config.gin``, ``operative.gin`` and ``environment.json``.

    Raises:
      RunError: the folder holds another run.
    """
    _forget_stillborn(RunDir(Path(out)))
    run = RunDir.claim(out, identity=run_hash(config, entry))
    write_text(run.path / "config.gin", config.text)
    write_text(run.path / "operative.gin", config.operative())
    write_text(run.path / "environment.json", json.dumps(environment(argv), indent=1) + "\n")
    return run


def _forget_stillborn(run: RunDir) -> None:
    """Frees the folder of a run that failed before its first step, e.g. by a rule with a typo."""
    if not run.path.is_dir() or run.status().get("state") != "failed":
        return
    if not run.metrics_path.exists() and not any(run.checkpoints.glob("*")):
        for name in WRITTEN:
            (run.path / name).unlink(missing_ok=True)


def execute(
    config: Config, entry: str, out: str | Path | None = None, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Runs an entry point of a configuration in its folder; its result goes to ``status.json``.

    Args:
      config: the configuration, the last one loaded.
      entry: a registered entry point that takes ``out`` and returns ``{name: number}``.
      out: the run folder; else ``<entry>.out``, else ``runs/<entry>-<hash>``.
      argv: the command line to record.

    Returns:
      The result.

    Raises:
      ConfigError: the configuration is wrong; nothing is written.
      RunError: the folder holds another run.
    """
    if entry not in bindings.registered:
        raise ConfigError(unknown("entry point", entry, bindings.registered))
    kwargs = config.arguments(entry)
    out = out or kwargs.get("out") or f"runs/{entry}-{run_hash(config, entry)}"
    run = prepare(config, entry, out, argv if argv is not None else ["flora", *sys.argv[1:]])
    run.write_status(state="running", entry=entry, started=time.time())
    try:
        result = bindings.registered[entry].thing(**{**kwargs, "out": str(out)}) or {}
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, Preempted))
        write_text(run.path / "error.txt", traceback.format_exc())
        run.write_status(state="preempted" if stopped else "failed", error=one_line(error))
        raise
    run.write_status(state="done", result=dict(result), error=None)
    return dict(result)


def one_line(error: BaseException) -> str:
    """The class and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def finished(status: Mapping[str, Any]) -> bool:
    """Whether a run is done and its result recorded."""
    return status.get("state") == "done" and "result" in status
