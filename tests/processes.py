"""The environment of the tests and of the processes they start."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

HERE = Path(__file__).parent
# Thousands of tiny programs run once or twice each: XLA compiles them quickly rather than well
# (a quarter of the time). The older emitters and one thread per program are part of that.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# XLA ends a process over a flag it does not know, so other versions go without: jaxlib 0.12 has
# lost the first, and the second alone saves nothing there.
KNOWN = "0.10."


def quick_compiles() -> dict[str, str]:
    """Variables that ask for it on CPUs; set them before jax is imported.

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 from outside keeps XLA's defaults.
    """
    asked = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
    if not asked or os.environ.get("JAX_PLATFORMS") != "cpu":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib").startswith(KNOWN) and QUICK not in flags:
        flags = f"{QUICK} {flags}".strip()
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}


def simulated(devices: int = 1, *folders: str | os.PathLike) -> dict[str, str]:
    """The environment of a process with simulated CPU devices that can import from the folders."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    found = [*folders, HERE, os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(str(folder) for folder in found if folder)
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
