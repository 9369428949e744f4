"""The kinds of layers that the fast tests leave to the whole suite."""

import pytest

# Every method meets every kind of layer under ``make test``; the fast tests keep these kinds.
FAST_KINDS = ("dense", "conv", "embedding")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        kind = getattr(item, "callspec", None) and item.callspec.params.get("kind")
        if kind and kind not in FAST_KINDS:
            item.add_marker(pytest.mark.broad)
