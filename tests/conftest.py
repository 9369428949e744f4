"""Settings every test shares."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a finished file would pile up to gigabytes."""
    yield
    jax.clear_caches()
