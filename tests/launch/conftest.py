import pytest

from flora_jax import config


@pytest.fixture(autouse=True)
def _clean_gin():
    config.clear()
    yield
    config.clear()
