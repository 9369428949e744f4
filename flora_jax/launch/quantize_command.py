"""Rounds a model's weights to low bits: a table of bytes and errors; with --out, the model too.

The error of a weight is |W - Q| / |W| (Frobenius)."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import quant
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import flatten
from flora_jax.launch import native
from flora_jax.launch.subjects import open_model

EXAMPLE = "flora quantize smollm2-135m --format int4 --block 64 --out smollm2-int4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a named model, a folder or a GGUF file")
    parser.add_argument("--format", default="int4", help="int8, int4 (default) ...")
    parser.add_argument("--block", type=int, help="weights that share a scale (default: a column)")
    parser.add_argument("--asymmetric", action="store_true", help="with a zero point")
    parser.add_argument(
        "--rule",
        action="append",
        metavar="REGEX",
        help="paths to quantise; repeat it (default: every kernel of a repeated block)",
    )
    parser.add_argument("--out", metavar="DIR", help="write the model there, in our format")


def run(options: argparse.Namespace) -> int:
    fmt = quant.Format(options.format, block=options.block, symmetric=not options.asymmetric)
    model, params, tokenizer = open_model(options.source, "float32", {})
    rules = dict.fromkeys(options.rule or [r"(.*/)?layers/.*/kernel"], fmt)
    low = quant.quantize(params, rules)
    print(report(params, low))
    if options.out:
        native.save(options.out, model, low, tokenizer)
        print(f"written: {options.out}")
    return 0


@jax.jit
def _error(weight: jax.Array, low: Any) -> jax.Array:
    return jnp.linalg.norm(weight - low.dense()) / jnp.linalg.norm(weight)


def report(params: Any, low: Any) -> str:
    """One line a low-bit weight: path, shape, MiB before and after, relative error; then totals."""
    before, after = flatten(params), flatten(low, is_leaf=is_leaf)
    rows = [("path", "shape", "MiB", "low-bit MiB", "error")]
    for path, leaf in after.items():
        if isinstance(leaf, quant.QArray):
            shape = "x".join(map(str, leaf.shape))
            sizes = (f"{x.nbytes / 2**20:.2f}" for x in (before[path], leaf))
            rows.append((path, shape, *sizes, f"{float(_error(before[path], leaf)):.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    total, small = (sum(x.nbytes for x in flat.values()) for flat in (before, after))
    lines.append(f"whole model: {total / 2**20:.1f} -> {small / 2**20:.1f} MiB")
    return "\n".join(lines)
