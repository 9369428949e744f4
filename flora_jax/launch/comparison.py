"""Runs as JSON in the fields of HF PEFT's method_comparison, so that both can be read together.

What differs: ``train_config`` holds our bindings, ``peft_config`` our adapters by path rule, and
the three memory fields are equal, since XLA allocates a step's memory once: they are its compiled
peak (arguments, activations, outputs) and there only for runs with ``train.measure = True``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flora_jax.launch.execute import finished
from flora_jax.launch.experiment import Experiment, Run
from flora_jax.training.run_dir import RunDir, write_text


def record(experiment: Experiment, run: Run, folder: Path, label: str) -> dict[str, Any]:
    """One finished run: ``run_info``, ``train_info`` and ``meta_info``."""
    found = RunDir(folder / run.id)
    status = found.status()
    environment = json.loads((found.path / "environment.json").read_text())
    result = status["result"]
    memory = result.get("peak_bytes")
    return {
        "run_info": {
            "created_at": environment["started"],
            "total_time": status["updated"] - status["started"],
            "experiment_name": f"{experiment.name}/{label}",
            "peft_branch": (environment["git"] or {}).get("commit"),
            "train_config": dict(run.bindings),
            "peft_config": _adapters(found.path),
            "error_msg": status.get("error") or "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": result["seconds"],
            "file_size": result["adapter_bytes"],
            "num_trainable_params": result["trained"],
            "num_total_params": result["parameters"],
            "forgetting": result.get("forgetting"),
            "status": "success",
            "metrics": [*found.metrics(), {"step": status["step"], **_figures(result)}],
        },
        "meta_info": {
            "package_info": {f"{k}-version": v for k, v in environment["versions"].items()},
            "system_info": {
                "platform": environment["platform"],
                "python": environment["python"],
                "accelerator": environment["devices"]["kind"],
            },
        },
    }


def _adapters(folder: Path) -> dict[str, Any]:
    """``{path: adapter}`` of the run's plan."""
    entries = json.loads((folder / "plan.json").read_text())["entries"]
    return {entry["path"]: entry["adapter"] for entry in entries}


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """The held-out figures, as ``test <name>``."""
    counts = ("seconds", "trained", "parameters", "bytes", "per_s", "forgetting")
    return {f"test {k}": v for k, v in result.items() if not any(c in k for c in counts)}


def write(
    experiment: Experiment,
    runs: Sequence[Run],
    folder: Path,
    out: Path,
    label: Callable[[dict[str, Any]], str],
) -> list[Path]:
    """One JSON file a finished run in ``out``; returns them."""
    written = []
    for run in runs:
        if not finished(RunDir(folder / run.id).status()):
            continue
        name = label(dict(run.bindings))
        safe = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in name)
        path = out / f"{safe}--{run.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(experiment, run, folder, name), indent=1, default=str)
        write_text(path, text + "\n")
        written.append(path)
    return written
