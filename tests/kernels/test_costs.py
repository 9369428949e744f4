"""How sizes are chosen: the cheapest candidate that fits, and what each op's model prefers."""

import pytest

from flora_jax.kernels import costs


def test_the_bound_is_memory_or_arithmetic_whichever_is_longer():
    device = costs.Device(bytes=10.0, flops={"bfloat16": 100.0, "int8": 200.0})
    assert device.bound(costs.Work(flops=100, bytes=20)) == 2.0
    assert device.bound(costs.Work(flops=1000, bytes=20)) == 10.0
    assert device.bound(costs.Work(flops=1000, bytes=20, unit="int8")) == 5.0
    assert device.bound(costs.Work(flops=1000, bytes=20, unit="float32")) == 10.0


def test_the_cheapest_that_fits_and_of_equals_the_first():
    how = {"what": "steps", "refusal": lambda n: f"{n} is too long" if n > 4 else None}
    assert costs.cheapest([1, 2, 4, 8], seconds=lambda n: 1 / n, **how) == 4
    assert costs.cheapest([2, 1, 4], seconds=lambda n: 1.0, **how) == 2
    with pytest.raises(NotImplementedError, match="no steps: 8 is too long"):
        costs.cheapest([8, 16], seconds=float, **how)


def test_steps_cost_beside_the_longer_of_memory_and_arithmetic():
    device = costs.Device(bytes=10.0, flops={"bfloat16": 100.0})
    machine = costs.Machine(device=device, vector=1.0, step=0.5, side=128)
    assert machine.seconds(costs.Work(flops=100, bytes=20), vector=3, steps=2) == 1 + 3 + 1
    assert machine.seconds(costs.Work(flops=100, bytes=50), vector=3, steps=2) == 5 + 1
    assert (machine.pad(1), machine.pad(128), machine.pad(129)) == (128, 128, 256)
