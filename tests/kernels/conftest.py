"""Targets of ahead-of-time compilation, skipped where their wheel is absent."""

import pytest

from flora_jax.kernels import aot


@pytest.fixture(params=sorted(aot.TARGETS))
def aot_target(request):
    """A target's name; ``parametrize("aot_target", [...], indirect=True)`` narrows the choice."""
    reason = aot.missing(request.param)
    if reason:
        pytest.skip(reason)
    return request.param
