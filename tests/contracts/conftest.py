"""Hundreds of tiny programs: compile them quickly rather than well."""

import jax
import pytest

# Every method meets every kind of layer under ``make test``; the fast tests keep these kinds.
FAST_KINDS = ("dense", "conv", "embedding")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        kind = getattr(item, "callspec", None) and item.callspec.params.get("kind")
        if kind and kind not in FAST_KINDS:
            item.add_marker(pytest.mark.broad)


@pytest.fixture(autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
