"""The examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def with_examples():
    for base, package in ((ROOT, "flora_jax"), (ROOT, "kernels")):
        for path in sorted((base / package).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = ("flora_jax", *parts) if package == "kernels" else parts
                yield ".".join(p for p in parts if p != "__init__")


@pytest.mark.parametrize("module", list(with_examples()))
def test_examples(module):
    results = doctest.testmod(
        importlib.import_module(module),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.attempted and not results.failed
