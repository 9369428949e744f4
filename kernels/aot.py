"""Ahead-of-time compilation for TPUs and Hopper GPUs on a machine that has neither.

The compilers come as wheels (``pip install flora_jax[aot]``): ``libtpu`` for TPUs, the CUDA plugin
for GPUs; no driver, no device. What compiles here fits the device's memories (a block that is too
large is refused) and has a cost that can be read; only its time needs the device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.kernels import costs, dispatch, hlo

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device to compile for.

    Attributes:
      platform: ``tpu`` or ``cuda``.
      dispatch: the platform's name in ``dispatch.ORDER``.
      topology: keyword arguments of the topology.
      wheel: the distribution that holds the compiler.
      module: a module of that distribution.
    """

    platform: str
    dispatch: str
    topology: dict[str, str]
    wheel: str
    module: str


def _tpu(name: str) -> Target:
    return Target(
        platform="tpu",
        dispatch="tpu",
        topology={"topology_name": f"{name}:2x2"},
        wheel="libtpu",
        module="libtpu",
    )


# By the names of ``costs.DEVICES``, which has their peak rates.
TARGETS = {
    "tpu_v5e": _tpu("v5e"),
    "tpu_v6e": _tpu("v6e"),
    "h100": Target(
        platform="cuda",
        dispatch="sm90",
        topology={"target_config": _H100, "topology": "1x1x1"},
        wheel="jax-cuda13-plugin",
        module="jax_cuda13_plugin",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for a device that need not be there, and what the compiler says of it.

    Attributes:
      target: name in ``TARGETS``.
      flops: operations; a Pallas kernel counts with what it declares: on TPU its ``cost_estimate``,
        on GPU, whose compiler has none, by ``costs.declared``.
      bytes: read and written in the device's memory, likewise; the GPU compiler gives no figure
        for the compiled program, so there the rest is read from its text (:mod:`kernels.hlo`) and
        its operations count as before fusion.
      kernel_bytes: the part of ``bytes`` that kernels have declared by ``costs.declared``.
      arguments: bytes of the arguments.
      outputs: bytes of the results.
      temporary: bytes of the largest set of intermediates alive at once.
      kernels: names of the custom calls in the program, one per Pallas kernel.
    """

    target: str
    flops: float
    bytes: float
    kernel_bytes: float
    arguments: int
    outputs: int
    temporary: int
    kernels: tuple[str, ...]


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ConfigError(unknown("compilation target", name, TARGETS))
    return TARGETS[name]


def missing(target: str) -> str | None:
    """Why nothing can be compiled for a target here, or None.

    Raises:
      ConfigError: unknown target.
    """
    goal = _target(target)
    if importlib.util.find_spec(goal.module) is None:
        return f"{target} needs the wheel {goal.wheel}: pip install 'flora_jax[aot]'"
    if goal.platform == "cuda" and metadata.version(goal.wheel) != jax.__version__:
        return (
            f"{goal.wheel} {metadata.version(goal.wheel)} is not for jax {jax.__version__}: "
            "pip install 'flora_jax[aot]'"
        )
    return None


def _topology(goal: Target) -> Any:
    # Plugins are loaded once, when jax starts: CUDA's then asks for cuDNN, which
    # compiling does not need, and is gone without it.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if goal.platform == "tpu" and jax.default_backend() != "tpu":
        # Without these libtpu asks a metadata server, which is not there, about this machine.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # Its lock file is for a chip, which is not there either: several processes may compile.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform=goal.platform, **goal.topology)
    except NotImplementedError as error:
        raise ConfigError(
            f"{error}: jax had started before its plugin could be loaded; start the process with "
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1"
        ) from None


def compile(f: Callable[..., Any], *args: Any, target: str, **kwargs: Any) -> Compiled:
    """Compiles ``f(*args, **kwargs)`` for one device of a target.

    Args:
      f: a function that jax can trace; ops in it take the target's kernels (``dispatch.target``).
      *args: pytrees of arrays or ``ShapeDtypeStruct``; only shapes and dtypes are read.
      target: ``tpu_v5e``, ``tpu_v6e`` or ``h100``.
      **kwargs: static keyword arguments of ``f``.

    Raises:
      ConfigError: unknown target, its wheel is missing or for another jax, or jax started without
        it.
      jax.errors.JaxRuntimeError: the program does not fit the device.
    """
    reason = missing(target)
    if reason is not None:
        raise ConfigError(reason)
    goal = _target(target)
    device = _topology(goal).devices[0]
    mesh = Mesh(np.array([device]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    # A function of its own: jax would give back what it traced for another target.
    program = jax.jit(lambda *arrays: f(*arrays, **kwargs))
    with dispatch.target(goal.dispatch), _use_device(goal, device, mesh.shape):
        executable = _lower(program, args, goal, sharding=place).compile()
    cost = executable.cost_analysis()
    if cost is None:
        with dispatch.target(goal.dispatch), _use_device(goal, device, {}):
            cost = dict(_lower(program, args, goal).cost_analysis() or {})
        cost["bytes accessed"] = hlo.moved(executable.as_text(), but="mosaic_gpu")
    return _read(executable, cost, target)


def _lower(program: Any, args: Any, goal: Target, sharding: Any = None) -> Any:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return program.trace(*shapes).lower(lowering_platforms=(goal.platform,))


def _use_device(goal: Target, device: Any, axes: dict[str, int]) -> Any:
    """Mosaic GPU asks the mesh in use for the device's kind."""
    gpu = goal.platform == "cuda"
    described = AbstractDevice(
        device_kind=device.device_kind,
        num_cores=132 if gpu else 1,
        platform="gpu" if gpu else goal.platform,
    )
    mesh = AbstractMesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        abstract_device=described,
    )
    return use_abstract_mesh(mesh)


def _read(executable: Any, cost: dict[str, float], target: str) -> Compiled:
    memory, text = executable.memory_analysis(), executable.as_text()
    declared = costs.declarations(text)
    kernel_bytes = sum(work.bytes for work in declared)
    names = [
        line.split('custom_call_target="')[1].split('"')[0]
        for line in text.splitlines()
        if 'custom_call_target="' in line
    ]
    return Compiled(
        target=target,
        flops=max(0.0, float(cost.get("flops", 0.0))) + sum(work.flops for work in declared),
        bytes=float(cost.get("bytes accessed", 0.0)) + kernel_bytes,
        kernel_bytes=kernel_bytes,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        kernels=tuple(names),
    )
