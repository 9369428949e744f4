"""What one compiled training step of a setup costs, as XLA counts it."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flora_jax import training
from flora_jax.launch.setup import Setup
from flora_jax.training.distributed import global_batch


def step_cost(built: Setup) -> Mapping[str, float]:
    """XLA's count of flops and bytes of one compiled training step; nothing runs."""
    batch = next(iter(built.batches()))
    if built.mesh is not None:
        batch = global_batch(batch, training.batch_sharding(built.mesh))
    chosen = {name: built.options[name] for name in ("accumulate", "clip")}
    step = training.make_step(built.subject.loss, built.plan, built.options["optimizer"], **chosen)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(batch))
    return training.compiled_cost(step, built.state, built.base, shapes)


def cost_lines(cost: Mapping[str, float]) -> str:
    """The figures for people."""
    mib = {name: cost[f"{name}_bytes"] / 2**20 for name in ("peak", "argument", "temp", "output")}
    return (
        f"one step, per device: {cost['flops'] / 1e9:.2f} Gflop (loops counted once), "
        f"peak {mib['peak']:.1f} MiB = arguments {mib['argument']:.1f} + activations and scratch "
        f"{mib['temp']:.1f} + outputs {mib['output']:.1f} - reused"
    )
