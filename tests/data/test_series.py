"""Series: the two curves against scipy, the windows, the order of the batches."""

import itertools

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.data import Series
from flora_jax.data.series import bessel_j2, damped_pendulum


def test_the_curves_are_those_of_scipy():
    integrate = pytest.importorskip("scipy.integrate")
    special = pytest.importorskip("scipy.special")
    slope = lambda s, t: [s[1], -0.15 * s[1] - 9.81 * np.sin(s[0])]
    want = integrate.odeint(slope, [0, 3], np.linspace(0, 20, 240), rtol=1e-10, atol=1e-10)[:, 1]
    np.testing.assert_allclose(damped_pendulum(), want, atol=1e-5)
    np.testing.assert_allclose(bessel_j2(), special.jv(2, np.linspace(2, 100, 256)), atol=1e-12)


@pytest.mark.parametrize("source, windows", [("damped_pendulum", 235), ("bessel_j2", 251)])
def test_windows_and_what_follows_them(source, windows):
    data = Series(source=source)
    (x, y), (later, _) = data.arrays("train"), data.arrays("test")
    values = data.values
    assert (values.min(), values.max()) == (-1, 1)
    assert len(x) == int(0.67 * windows) and len(x) + len(later) == windows
    np.testing.assert_allclose(x[3, :, 0], values[3:7], rtol=1e-6)
    np.testing.assert_allclose(y[3, 0], values[7], rtol=1e-6)
    np.testing.assert_allclose(later[0, 0, 0], values[len(x)], rtol=1e-6)
    flat = Series(source=source, as_features=True)
    assert flat.features == 4 and flat.arrays("train")[0].shape == (len(x), 1, 4)
    np.testing.assert_array_equal(flat.arrays("test")[0][:, 0], later[:, :, 0])


def test_batches_in_order_and_shuffled():
    data = Series()
    x = data.arrays("train")[0]
    first, second = itertools.islice(data.train(batch_size=10), 2)
    np.testing.assert_array_equal(first["x"], x[:10])
    np.testing.assert_array_equal(second["x"], x[10:20])
    mixed = next(iter(Series(shuffle=True).train(batch_size=10, seed=1)))
    assert not np.array_equal(mixed["x"], first["x"])
    held = list(data.evaluation(batch_size=50))
    assert sum(batch["weight"].sum() for batch in held) == 78 and len(held) == 2


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="nearest: damped_pendulum"):
        Series(source="damped_pendulm")
    with pytest.raises(ConfigError, match="window=300 does not fit 240"):
        Series(window=300)
    with pytest.raises(ConfigError, match=r"fraction=1\.0"):
        Series(fraction=1.0)
