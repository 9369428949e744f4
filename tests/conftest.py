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
    """Programs for devices that are not here: what their compilers make of them is the test."""
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    ahead = quick and request.node.get_closest_marker("aot") is not None
    if ahead:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if ahead:
        jax.config.update("jax_disable_most_optimizations", True)
