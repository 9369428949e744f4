"""Several processes: start-up, and global arrays from each process's rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from flora_jax.core import paths
from flora_jax.core.errors import ConfigError

# launcher variables that say how many processes a job has; a stray one says 1 or nothing
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of this job as the launcher tells it (SLURM step, Open MPI, PMI); 1 if it does not.

    >>> launched_processes({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}), launched_processes({})
    (4, 1)
    """
    counts = [int(environment[name]) for name in _COUNTS if environment.get(name, "").isdigit()]
    # an interactive shell inside an allocation has SLURM_NTASKS but is not one of its tasks
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" not in environment:
        return 1
    return max(counts, default=1)


def initialize(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    mode: str = "auto",
) -> bool:
    """Starts ``jax.distributed`` when the job has more than one process; call it before any array.

    Args:
      coordinator: ``host:port`` of process 0; with ``processes`` and ``process``, or none of them.
      processes, process: number of processes and this one's index.
      mode: ``auto`` (only what the launcher tells), ``on`` (let JAX find the cluster: TPU pods),
        ``off``.

    Returns:
      Whether several processes run.

    Raises:
      ConfigError: an unknown mode, or some but not all explicit arguments.
    """
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"distributed mode {mode!r} is not one of auto, on, off")
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ConfigError("coordinator, processes and process go together: give all three or none")
    if mode == "off" or processes == 1:
        return False
    if all(given):
        jax.distributed.initialize(coordinator, processes, process)
    elif mode == "on" or launched_processes() > 1:
        jax.distributed.initialize()
    return jax.process_count() > 1


def global_batch(local: Mapping[str, Any], sharding: NamedSharding) -> Any:
    """Global arrays ``[B, ...]`` from this process's rows ``[B / processes, ...]``.

    Rows keep process order: process 0's come first.

    Raises:
      ConfigError: the rows do not divide over this process's devices.
    """
    devices = sharding.mesh.devices.size
    entry = sharding.spec[0] if len(sharding.spec) else None
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    ways = 1
    for name in names:
        ways *= sharding.mesh.shape[name]

    def one(path: str, x: Any) -> jax.Array:
        rows = x.shape[0] * jax.process_count()
        if rows % ways:
            raise ConfigError(
                f"batch {path!r} of {rows} rows does not divide into the {ways} parts of mesh axes "
                f"{names} ({devices} devices)"
            )
        shape = (rows, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return paths.map_with_path(one, dict(local))


def is_main() -> bool:
    """Whether this process writes metrics, status and the progress bar."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process raised its flag; every process must call it at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
