"""What a compiled step costs, as XLA counts it: flops, bytes moved and peak memory."""

from __future__ import annotations

from typing import Any

import jax


def compiled_cost(step: Any, *args: Any) -> dict[str, float]:
    """Compiles ``step`` for arguments (arrays or ShapeDtypeStructs; nothing runs) and reports.

    Args:
      step: a jitted function, or a plain one (jitted here without donation).
      *args: e.g. ``state, base, batch``.

    Returns:
      ``flops`` and ``bytes`` accessed (XLA counts the body of a loop once), and per device
      ``temp_bytes`` (activations and scratch), ``argument_bytes``, ``output_bytes``,
      ``alias_bytes`` (donated arguments reused as outputs), ``code_bytes`` and
      ``peak_bytes = argument + output + temp - alias``.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    >>> cost = compiled_cost(lambda a: a @ a, x)
    >>> int(cost["argument_bytes"]), cost["flops"] >= 2 * 64**3
    (16384, True)
    """
    if not hasattr(step, "lower"):
        step = jax.jit(step)
    compiled = step.lower(*args).compile()
    counted = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    cost = {"flops": counted.get("flops", 0.0), "bytes": counted.get("bytes accessed", 0.0)}
    fields = {"temp": "temp", "argument": "argument", "output": "output", "alias": "alias"}
    fields["code"] = "generated_code"
    for name, field in fields.items():
        cost[f"{name}_bytes"] = float(getattr(memory, f"{field}_size_in_bytes", 0))
    live = cost["argument_bytes"] + cost["output_bytes"] + cost["temp_bytes"]
    cost["peak_bytes"] = live - cost["alias_bytes"]
    return cost
