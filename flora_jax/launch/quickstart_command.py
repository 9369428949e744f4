"""Fine-tunes SmolLM2-135M on the Python reference, with LoRA and then with FLoRA, and compares.

Both are runs of configs/runs/finetune_lm.gin; a second call continues or shows what is there."""

from __future__ import annotations

import argparse
from pathlib import Path

from flora_jax import config
from flora_jax.launch import arguments, catalogue
from flora_jax.launch.execute import execute

EXAMPLE = "flora quickstart --out runs/quickstart"
METHODS = ("LoRA", "FLoRA")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/quickstart", help="folder of the two run folders")
    parser.add_argument(
        "--gin.NAME=VALUE", dest="_", action="store_true", help="a binding for both runs"
    )
    arguments.add_search_paths(parser)


def run(options: argparse.Namespace) -> int:
    catalogue.register_all()
    rows = [("method", "trained", "perplexity before", "after", "seconds", "tokens/s")]
    for method in METHODS:
        print(f"== {method}", flush=True)
        chosen = config.load(
            ["runs/finetune_lm.gin"],
            [f"adapter=@{method}", *options.bindings],
            options.gin_search_paths,
        )
        result = execute(chosen, "train", Path(options.out) / method.lower())
        rows.append(
            (
                method,
                f"{result['trained']:,}",
                f"{result['perplexity_before']:.2f}",
                f"{result['perplexity']:.2f}",
                f"{result['seconds']:.0f}",
                f"{result.get('tokens_per_s', 0):.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0
