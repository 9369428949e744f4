"""How sizes are chosen: the cheapest candidate that fits, and what each op's model prefers."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import costs, dispatch
from flora_jax.kernels.block_sparse_attention import Steps, arg_specs, layout, sizes
from flora_jax.kernels.gated_linear_attention import chunks
from flora_jax.kernels.window_attention import window_attention


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


def chunked(gate, **sizes):
    width = {"channel": 128, "head": 1, "none": 0}[gate]
    given = {"batch": 2, "length": 4096, "heads": 16, "group": 1, "dim": 128, "value_dim": 128}
    return chunks.Call(**given | sizes, gate=width, dtype=jnp.dtype("bfloat16"))


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_dear_steps_make_long_chunks_and_free_ones_short(gate):
    """A short sequence has no chunk beyond its end, whatever a step costs."""
    pick = lambda step, call: chunks.choose(call, dataclasses.replace(costs.TPU, step=step, side=1))
    assert pick(1.0, chunked(gate)) == 256
    assert pick(0.0, chunked(gate)) <= 64
    assert pick(1.0, chunked(gate, length=100)) == 128
    assert pick(1.0, chunked(gate, length=3)) == 4


def test_decays_per_channel_make_chunks_no_longer():
    """They cost log2(C) products more; tiles of 128 make 128 better than 64."""
    found = [chunks.choose(chunked(gate), costs.TPU) for gate in ("channel", "head", "none")]
    assert found == sorted(found) and found[0] == 128


def test_a_chunk_fits_the_memory_or_none_does():
    refusal = lambda chunk: "too long" if chunk > 32 else None
    assert chunks.choose(chunked("none"), costs.TPU, refusal=refusal) == 32
    with pytest.raises(NotImplementedError, match="no chunk for heads of 128 and 128, .*: never"):
        chunks.choose(chunked("none"), costs.TPU, refusal=lambda chunk: "never")


def sparse(spec, dtype="bfloat16", **blocks):
    """The shape of a benchmark's call and the blocks a step of each kernel takes."""
    spec = dataclasses.replace(spec, dtype=dtype, **blocks)
    shape = layout.shape_of(*spec.arguments(), spec.block_q, spec.block_k, None)
    dtype = jnp.dtype(dtype)
    kernels = sizes.forward(shape), sizes.dq(shape), sizes.dkv(shape)
    numbers = *(sizes.keys(shape, k, dtype) for k in kernels[:2]), sizes.queries(shape, dtype)
    for kernel, number in zip(kernels, numbers):
        assert kernel.memory(number, shape.width, dtype.itemsize) <= sizes.VMEM
    return shape, numbers


def test_a_step_takes_the_whole_row_where_it_fits_and_equal_shares_where_not():
    for spec in arg_specs.BENCH:
        shape, (forward, dq, dkv) = sparse(spec)
        assert forward == dq == shape.entries and dkv <= 16
    # As many steps as their number asks for, the padding of the last one spread over all.
    shape, (forward, *_) = sparse(arg_specs.BENCH[1], block_k=128, density=1.0, dtype="float32")
    assert shape.entries == 32 and forward == 16


def test_longer_rows_make_longer_segments_of_the_keys_gradient():
    found = [sparse(spec)[1][2] for spec in arg_specs.BENCH]
    assert found == sorted(found) and found[0] < found[-1]


def test_steps_of_no_block_are_refused():
    with pytest.raises(ConfigError, match=r"Steps\(queries=0\): at least 1"):
        Steps(queries=0)


def test_long_sequences_get_long_blocks_of_queries_unless_they_are_padding():
    """By the grid of a window's kernel."""

    def grid(length, **how):
        call = partial(window_attention, window=64, implementation="pallas_tpu", **how)
        q = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
        return re.findall(r"grid=\(1, 2, (\d+)\)", str(jax.make_jaxpr(call)(q, q, q)))

    with dispatch.target("tpu"):
        assert (grid(4096), grid(4096, block=256)) == (["4"], ["16"])
        # Of two blocks of 1024 nearly half would lie behind the end.
        assert (grid(100), grid(1100)) == (["1"], ["3"])
