"""A batch whose rows have adapters of their own, against one call for each adapter and none at all.

SmolLM2's width and heads, fewer layers and words by default, random float32 weights, LoRA on q and
v. Forward pass, and loss with gradients of the adapters; the sides take turns, so that a busy
machine slows all; figures are medians and their ratios to the base (one shared adapter when
training).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax import models
from flora_jax.core.errors import ConfigError
from flora_jax.launch.peers import SMOLLM2
from flora_jax.models import Llama, LlamaConfig

EXAMPLE = "flora bench adapters --adapters 8 --length 64 --rounds 7"
RULE = r"layers/self_attn/(q|v)_proj/kernel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", type=int, default=8, help="and rows of the batch (default 8)")
    parser.add_argument("--length", type=int, default=64, help="tokens a row (default 64)")
    parser.add_argument("--rank", type=int, default=8, help="of each LoRA (default 8)")
    parser.add_argument("--layers", type=int, default=6, help="of the model (default 6)")
    parser.add_argument("--vocab", type=int, default=8192, help="words (default 8192)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    for name in ("adapters", "length", "rank", "layers", "vocab", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1")
    figures = measure(options)
    print(json.dumps(figures, indent=1) if options.json else table(figures))
    return 0


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """``{forward | training: {side: {seconds, ratio, compile_seconds}}}``."""
    out = {}
    for phase, sides in sides_of(options).items():
        first = {name: _seconds(side) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                times[name].append(_seconds(side))
        medians = {name: statistics.median(values) for name, values in times.items()}
        reference = next(iter(medians.values()))
        out[phase] = {
            name: {"seconds": s, "ratio": s / reference, "first_seconds": first[name]}
            for name, s in medians.items()
        }
    return out


def _seconds(side: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(side())
    return time.perf_counter() - started


def sides_of(options: argparse.Namespace) -> dict[str, dict[str, Callable[[], Any]]]:
    """The calls of both phases; the first of each is what the others are compared with."""
    shape = {**SMOLLM2, "num_hidden_layers": options.layers, "vocab_size": options.vocab}
    model = Llama(LlamaConfig(**shape, remat="dots"))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
    base = jax.tree.map(draw, models.abstract(model))
    plan = flora.plan(base, {RULE: flora.LoRA(rank=options.rank)})
    count = options.adapters
    bank = flora.AdapterBank(plan, capacity=count)
    trees = [flora.init(plan, jax.random.key(n), base) for n in range(count)]
    for n, tree in enumerate(trees):
        bank.load(str(n), jax.tree.map(lambda a: a + 0.01, tree))
    trees = [bank.get(str(n)) for n in range(count)]
    rows = bank.rows([str(n) for n in range(count)])
    tokens = jnp.asarray(rng.integers(0, options.vocab, (count, options.length)), jnp.int32)

    def loss(bound: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": bound}, tokens)[0][:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean(axis=(1, 2)).sum()

    forward = jax.jit(lambda base, tokens: model.apply({"params": base}, tokens)[0])
    single = lambda tree, base: flora.bind(base, tree, plan)
    mixed = lambda slots, base: flora.bind(base, slots, plan, rows=rows)
    one = jax.jit(lambda tree, base, tokens: forward(single(tree, base), tokens))
    all_ = jax.jit(lambda slots, base, tokens: forward(mixed(slots, base), tokens))
    grad_one = jax.jit(jax.value_and_grad(lambda t, base, x: loss(single(t, base), x)))
    grad_all = jax.jit(jax.value_and_grad(lambda s, base, x: loss(mixed(s, base), x)))
    apart = [tokens[n : n + 1] for n in range(count)]
    each = lambda f: [f(tree, base, x) for tree, x in zip(trees, apart)]
    return {
        "forward": {
            "base": lambda: forward(base, tokens),
            "one adapter": lambda: one(trees[0], base, tokens),
            "mixed batch": lambda: all_(bank.arrays, base, tokens),
            f"{count} calls": lambda: each(one),
        },
        "training": {
            "one adapter": lambda: grad_one(trees[0], base, tokens),
            "mixed batch": lambda: grad_all(bank.arrays, base, tokens),
            f"{count} calls": lambda: each(grad_one),
        },
    }


def table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: one row a phase and side."""
    rows = [["phase", "side", "milliseconds", "ratio", "first call s"], ["---"] * 5]
    for phase, sides in figures.items():
        for name, f in sides.items():
            seconds = f"{1e3 * f['seconds']:.1f}"
            rows.append([phase, name, seconds, f"{f['ratio']:.2f}", f"{f['first_seconds']:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
