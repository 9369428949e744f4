"""Attention variants against softmax over sequence lengths: time, memory, and where they cross.

The attention alone, at SmolLM2's heads by default, causal where a variant is; forward pass, or
forward and gradient. The variants of a length take turns, so that a busy machine slows all; figures
are medians. Memory is what the compiled program holds besides its arguments and results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.attention import Causal, Full, Inputs, Sizes, Softmax, Variant
from flora_jax.core.errors import ConfigError, FloraError, unknown
from flora_jax.core.registry import lookup, methods

EXAMPLE = "flora bench attention --variants Hedgehog,LoLCATs --lengths 512,1024,2048,4096"
BASELINE = "Softmax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(m.name for m in methods("attention") if m.name != BASELINE)
    parser.add_argument(
        "--variants", default="LinearAttention,Hedgehog,LoLCATs", help=f"of {known}"
    )
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="tokens, comma-separated")
    parser.add_argument("--batch", type=int, default=1, help="rows (default 1)")
    parser.add_argument("--heads", type=int, default=9, help="query heads (default 9)")
    parser.add_argument("--kv_heads", type=int, default=3, help="key heads (default 3)")
    parser.add_argument("--dim", type=int, default=64, help="of a head (default 64)")
    parser.add_argument("--dtype", default="float32", help="of the activations (default float32)")
    parser.add_argument("--forward", action="store_true", help="no gradient")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument(
        "--implementation", default="grouped", help="of the softmax baseline (default grouped)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    figures = measure(options)
    print(json.dumps(figures, indent=1) if options.json else table(figures))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """``{"lengths": [...], "variants": {name: {seconds, temp_bytes, state_bytes, crossover}}}``.

    ``crossover``: the length from which the variant is faster than the baseline, between two
    measured ones on logarithmic scales; None if it never is.
    """
    try:
        lengths = sorted(int(n) for n in options.lengths.split(","))
    except ValueError:
        raise ConfigError(f"--lengths {options.lengths!r} is no list of numbers") from None
    if lengths[0] < 1 or options.rounds < 1 or options.heads % options.kv_heads:
        raise ConfigError("lengths and rounds start at 1, kv_heads divides heads")
    sizes = Sizes(
        heads=options.heads,
        kv_heads=options.kv_heads,
        dim=options.dim,
        width=options.heads * options.dim,
    )
    sides = {BASELINE: Softmax(implementation=options.implementation)}
    sides |= {name: _variant(name, sizes) for name in options.variants.split(",") if name}
    out = {name: {"seconds": [], "temp_bytes": [], "state_bytes": []} for name in sides}
    for length in lengths:
        programs = {n: _program(v, sizes, length, options) for n, v in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, (compiled, arguments) in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                times[name].append(time.perf_counter() - started)
        for name, (compiled, _) in programs.items():
            out[name]["seconds"].append(statistics.median(times[name]))
            out[name]["temp_bytes"].append(compiled.memory_analysis().temp_size_in_bytes)
            out[name]["state_bytes"].append(_state_bytes(sides[name], sizes, length, options))
    base = out[BASELINE]["seconds"]
    for figures in out.values():
        figures["crossover"] = crossover(lengths, base, figures["seconds"])
    return {"lengths": lengths, "variants": out}


def _variant(name: str, sizes: Sizes) -> Variant:
    known = [m.name for m in methods("attention")]
    if name not in known:
        raise ConfigError(unknown("variant", name, known))
    variant = lookup("attention", name)()
    variant.check(sizes)
    return variant


def _program(variant: Variant, sizes: Sizes, length: int, options: argparse.Namespace) -> Any:
    """The compiled call and its arguments, run once."""
    keys = jax.random.split(jax.random.key(0), 5)
    dtype = jnp.dtype(options.dtype)
    draw = lambda key, *shape: jax.random.normal(key, (options.batch, length, *shape), dtype)
    q = draw(keys[0], sizes.heads, sizes.dim)
    k, v = (draw(key, sizes.kv_heads, sizes.dim) for key in keys[1:3])
    x = draw(keys[3], sizes.width)
    side = math.isqrt(length)
    mask = Causal() if Causal in variant.masks else Full()

    def forward(params: Any, q: jax.Array, k: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        inputs = Inputs(x=x, q=q, k=k, rotate=lambda y: y, grid=(side, side))
        return variant.attend(params, q, k, v, mask=mask, inputs=inputs)[0]

    loss = lambda *a: forward(*a).astype(jnp.float32).sum()
    call = forward if options.forward else jax.grad(loss, (0, 1, 2, 3))
    arguments = (variant.init(keys[4], sizes, jnp.float32), q, k, v, x)
    compiled = jax.jit(call).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    return compiled, arguments


def _state_bytes(
    variant: Variant, sizes: Sizes, length: int, options: argparse.Namespace
) -> int | None:
    """Of one layer's state at this length; None for a variant that does not generate."""
    if not variant.generates:
        return None
    dtype = jnp.dtype(options.dtype)
    make = lambda: variant.init_state(sizes, options.batch, length, dtype, Causal())
    try:
        state = jax.eval_shape(make)
    except FloraError:
        return None
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(state))


def crossover(lengths: list[int], base: list[float], other: list[float]) -> float | None:
    """The length from which ``other`` stays below ``base``, between two lengths by the logarithm.

    >>> crossover([1, 2, 4], [1.0, 2.0, 4.0], [4.0, 2.0, 1.0])
    2.0
    >>> crossover([1, 2], [1.0, 2.0], [3.0, 3.0]) is None
    True
    """
    gaps = [math.log(b / o) for b, o in zip(base, other)]
    if gaps[-1] <= 0:
        return None
    i = len(gaps) - 1
    while i > 0 and gaps[i - 1] > 0:
        i -= 1
    if i == 0:
        return float(lengths[0])
    share = -gaps[i - 1] / (gaps[i] - gaps[i - 1])
    low, high = math.log(lengths[i - 1]), math.log(lengths[i])
    return round(math.exp(low + share * (high - low)), 1)


def table(figures: dict[str, Any]) -> str:
    """Markdown: a row for each variant and length."""
    head = ["variant", "tokens", "milliseconds", "x softmax", "temporary MB", "state kB"]
    rows = [head, ["---"] * len(head)]
    base = figures["variants"][BASELINE]["seconds"]
    for name, f in figures["variants"].items():
        for i, length in enumerate(figures["lengths"]):
            state = f["state_bytes"][i]
            rows.append(
                [
                    name,
                    str(length),
                    f"{1e3 * f['seconds'][i]:.1f}",
                    f"{f['seconds'][i] / base[i]:.2f}",
                    f"{f['temp_bytes'][i] / 1e6:.1f}",
                    "-" if state is None else f"{state / 1e3:.0f}",
                ]
            )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    for name, f in figures["variants"].items():
        if name != BASELINE:
            where = "never" if f["crossover"] is None else f"from about {f['crossover']:.0f} tokens"
            where = "at every length" if f["crossover"] == figures["lengths"][0] else where
            lines.append(f"{name} is faster than softmax {where}.")
    return "\n".join(lines)
