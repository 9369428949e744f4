"""Lists the registered methods: family, name, arXiv id, whether it merges, PEFT type, count."""

from __future__ import annotations

import argparse
import dataclasses
import json

from flora_jax.core.registry import methods
from flora_jax.launch import catalogue

EXAMPLE = "flora methods --family adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--json", action="store_true", help="as JSON, one list")


def run(options: argparse.Namespace) -> int:
    catalogue.register_all()
    rows = methods(options.family)
    if options.json:
        print(json.dumps([_plain(row) for row in rows], indent=1))
        return 0
    lines = [("family", "name", "arXiv", "merges", "HF PEFT", "trained numbers", "paper")]
    for row in rows:
        merges = "yes" if row.mergeable else "no"
        peft = row.peft or "-"
        lines.append((row.family, row.name, row.arxiv, merges, peft, row.parameters, row.paper))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    return 0


def _plain(row) -> dict:
    data = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {**data, "cls": f"{row.cls.__module__}.{row.cls.__qualname__}"}
