"""Settings every test shares."""

import os

from processes import quick_compiles

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(quick_compiles())

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a finished file would pile up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _compiled_as_users_do(request):
    """Where what the compiler makes of a program is the test: memory, flops, other devices."""
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    well = quick and any(request.node.get_closest_marker(m) for m in ("aot", "optimised"))
    if well:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if well:
        jax.config.update("jax_disable_most_optimizations", True)
