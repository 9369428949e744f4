"""Decoding at a long context: tokens a second and bytes of the state, by attention.

SmolLM2-135M's architecture with random weights, greedy, one compiled loop of steps for each
attention and context. The state is made as for a context of that many tokens and the steps end at
its last place: what a cache of static shape costs does not depend on what is in it. The sides of a
context take turns, so that a busy machine slows all; figures are medians.
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
import numpy as np

from flora_jax import models
from flora_jax.core.errors import ConfigError, FloraError, unknown
from flora_jax.core.registry import lookup, methods
from flora_jax.evaluation.generate import Sampling, advance
from flora_jax.launch.peers import SMOLLM2
from flora_jax.models import Llama, LlamaConfig

EXAMPLE = "flora bench decode --variants Liger,Hedgehog --contexts 1024,4096,16384"
BASELINE = "Softmax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(m.name for m in methods("attention") if m.name != BASELINE)
    parser.add_argument("--variants", default="LinearAttention,Hedgehog,Liger", help=f"of {known}")
    parser.add_argument("--contexts", default="1024,4096,16384", help="tokens, comma-separated")
    parser.add_argument("--batch", type=int, default=1, help="rows (default 1)")
    parser.add_argument("--tokens", type=int, default=16, help="a timed call makes (default 16)")
    parser.add_argument("--layers", type=int, default=30, help="of the model (default 30)")
    parser.add_argument("--vocab", type=int, default=49152, help="words (default 49152)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    for name in ("batch", "tokens", "layers", "vocab", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1")
    figures = measure(options)
    print(json.dumps(figures, indent=1) if options.json else table(figures))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """``{"contexts": [...], "variants": {name: {tokens_per_s, state_bytes}}}``, of all rows."""
    try:
        contexts = sorted(int(n) for n in options.contexts.split(","))
    except ValueError:
        raise ConfigError(f"--contexts {options.contexts!r} is no list of numbers") from None
    if contexts[0] < options.tokens:
        raise ConfigError(f"--contexts {contexts[0]} must be at least --tokens {options.tokens}")
    names = [BASELINE, *(n for n in options.variants.split(",") if n)]
    sides = {name: _model(name, options) for name in names}
    out = {name: {"tokens_per_s": [], "state_bytes": []} for name in sides}
    for context in contexts:
        calls = {name: _call(*side, context, options) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, (call, _) in calls.items():
                times[name].append(call())
        for name, (_, state_bytes) in calls.items():
            each = options.batch * options.tokens / statistics.median(times[name])
            out[name]["tokens_per_s"].append(each)
            out[name]["state_bytes"].append(state_bytes)
    return {"contexts": contexts, "variants": out}


def _model(name: str, options: argparse.Namespace) -> tuple[Llama, Any]:
    """The model and its random weights; those that all sides share are equal."""
    known = [m.name for m in methods("attention")]
    if name not in known:
        raise ConfigError(unknown("variant", name, known))
    shape = {**SMOLLM2, "num_hidden_layers": options.layers, "vocab_size": options.vocab}
    variant = lookup("attention", name)()
    if not variant.generates:
        raise ConfigError(f"{name} has no state to generate with")
    model = Llama(LlamaConfig(**shape, attention=variant))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
    return model, jax.tree.map(draw, models.abstract(model))


def _call(model: Llama, params: Any, context: int, options: argparse.Namespace) -> Any:
    """A function that decodes and gives its seconds, run once; and the bytes of its state."""
    sampling, rows = Sampling(), (options.batch,)

    def steps(params, state):
        body = lambda state, _: (
            advance(model, params, state, jax.random.key(0), sampling.kind, sampling.numbers()),
            None,
        )
        return jax.lax.scan(body, state, length=options.tokens)[0]

    def start():
        return {
            "cache": model.init_cache(options.batch, context),
            "token": jnp.zeros(rows, jnp.int32),
            "position": jnp.full(rows, context - options.tokens, jnp.int32),
            "count": jnp.int32(0),
        }

    try:
        state = start()
    except FloraError as e:
        raise ConfigError(f"{type(model.config.attention).__name__} at {context}: {e}") from None
    compiled = jax.jit(steps, donate_argnums=1).lower(params, state).compile()
    bytes_ = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state["cache"]))

    def timed() -> float:
        state = jax.block_until_ready(start())
        started = time.perf_counter()
        jax.block_until_ready(compiled(params, state))
        return time.perf_counter() - started

    timed()
    return timed, bytes_


def table(figures: dict[str, Any]) -> str:
    """Markdown: a row for each variant and context."""
    head = ["attention", "context", "tokens/s", "x softmax", "state MB", "x softmax"]
    rows = [head, ["---"] * len(head)]
    base = figures["variants"][BASELINE]
    for name, f in figures["variants"].items():
        for i, context in enumerate(figures["contexts"]):
            speed, size = f["tokens_per_s"][i], f["state_bytes"][i]
            rows.append(
                [
                    name,
                    str(context),
                    f"{speed:.1f}",
                    f"{speed / base['tokens_per_s'][i]:.2f}",
                    f"{size / 1e6:.2f}",
                    f"{size / base['state_bytes'][i]:.4f}",
                ]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
