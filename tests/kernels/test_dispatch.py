"""Which implementation of a kernel runs: argument, context, environment, platform."""

import logging

import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import dispatch


def cannot(x):
    raise NotImplementedError(f"{x} is odd")


TABLE = {"mosaic_gpu": cannot, "pallas_tpu": cannot, "xla": lambda x: ("xla", x)}


@pytest.mark.parametrize("platform", dispatch.ORDER)
def test_the_platform_decides_and_what_cannot_run_gives_way(platform):
    with dispatch.target(platform):
        assert dispatch.run("op", TABLE, 3) == ("xla", 3)


def test_a_kernel_comes_first_on_its_platform():
    table = TABLE | {"pallas_tpu": lambda x: ("tpu", x)}
    with dispatch.target("tpu"):
        assert dispatch.run("op", table, 3) == ("tpu", 3)
    assert dispatch.run("op", table, 3) == ("xla", 3)
    with dispatch.interpret():
        assert dispatch.run("op", table, 3, implementation="pallas_tpu") == ("tpu", 3)


def test_untried_kernels_run_only_when_asked_for():
    """No device has run the Hopper kernels yet: a Hopper GPU takes the XLA form by itself."""
    table = TABLE | {"mosaic_gpu": lambda x: ("gpu", x)}
    with dispatch.target("sm90"):
        assert dispatch.run("op", table, 3) == ("xla", 3)
        assert dispatch.run("op", table, 3, implementation="mosaic_gpu") == ("gpu", 3)
        with dispatch.untried():
            assert dispatch.run("op", table, 3) == ("gpu", 3)
            assert dispatch.run("op", TABLE, 3) == ("xla", 3)
        with dispatch.use("xla"), dispatch.untried():
            assert dispatch.run("op", table, 3) == ("xla", 3)
    with dispatch.untried():
        assert dispatch.run("op", table, 3) == ("xla", 3)


def test_a_choice_is_final_and_says_why():
    with pytest.raises(NotImplementedError, match="^op: pallas_tpu: needs a TPU; this is cpu$"):
        dispatch.run("op", TABLE, 3, implementation="pallas_tpu")
    with dispatch.target("tpu"), pytest.raises(NotImplementedError, match="^op: pallas_tpu: 3 is"):
        dispatch.run("op", TABLE, 3, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="^op: reference: the op has none$"):
        dispatch.run("op", TABLE, 3, implementation="reference")
    assert dispatch.run("op", TABLE, 3, implementation=("reference", "xla")) == ("xla", 3)


def test_one_that_expects_to_be_slower_gives_way_if_another_can_run(caplog):
    table = TABLE | {"reference": lambda x: ("reference", x)}
    slow = lambda x: f"{x} is many" if x > 2 else None
    run = lambda x, *names: dispatch.run(
        "large", table, x, implementation=names, yields={"reference": slow}
    )
    assert run(1, "reference", "xla") == ("reference", 1)
    with caplog.at_level(logging.INFO, logger="flora_jax.kernels"):
        assert run(3, "reference", "xla") == ("xla", 3)
    assert "large runs as xla (reference: 3 is many)" in caplog.text
    assert run(3, "reference") == ("reference", 3)
    with dispatch.target("tpu"):
        assert run(3, "reference", "pallas_tpu", "mosaic_gpu") == ("reference", 3)


def test_argument_before_context_before_environment(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference,xla")
    assert dispatch.chosen(None) == ("reference", "xla")
    with dispatch.use("pallas_tpu"):
        assert dispatch.chosen(None) == ("pallas_tpu",)
        assert dispatch.chosen("xla") == ("xla",)
    assert dispatch.chosen(None) == ("reference", "xla")


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'pallas'; nearest: pallas_tpu"):
        dispatch.use("pallas")
    with pytest.raises(ConfigError, match="'gpu'"):
        dispatch.target("gpu")
    monkeypatch.setenv(dispatch.VARIABLE, "xlaa")
    with pytest.raises(ConfigError, match="'xlaa'; nearest: xla"):
        dispatch.run("op", TABLE, 3)


def test_the_first_use_logs_the_choice(caplog):
    with caplog.at_level(logging.INFO, logger="flora_jax.kernels"), dispatch.target("tpu"):
        for _ in range(2):
            dispatch.run("logged once", TABLE, 3)
    assert [r.message for r in caplog.records] == ["logged once runs as xla (pallas_tpu: 3 is odd)"]
