"""The TPU kernels of gated linear attention: simulated memory, races, compiles without a device."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from recurrence import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, call, check, features

from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.gated_linear_attention import pallas_tpu
from flora_jax.kernels.gated_linear_attention.arg_specs import BENCH, SMALL, ArgSpec

SIMULATED = pltpu.InterpretParams(
    dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True
)


WIDE = ArgSpec(length=40, heads=4, kv_heads=2, dim=128, value_dim=128, state=True)


@pytest.mark.parametrize("name", [*SMALL, "heads of whole lanes"])
def test_simulated_tpu_equals_the_recurrence(name):
    """Memory starts as NaN, so that whatever is read before it is written shows."""
    spec = dataclasses.replace(SMALL.get(name, WIDE), length=40, batch=1)
    limits = (FLOAT32, FLOAT32)
    if spec.dtype == "bfloat16":
        limits = BFLOAT16, BFLOAT16_GRADIENT
    with dispatch.interpret(SIMULATED):
        check(spec.draw(jax.random.key(1)), *limits, chunk=16, implementation="pallas_tpu")


@pytest.mark.parametrize("name", ["grouped", "bfloat16", "heads of whole lanes"])
def test_features_made_in_the_kernel(name):
    """Neither they nor their gradients are written; the last chunk is short."""
    spec = dataclasses.replace(SMALL.get(name, WIDE), length=37, batch=1)
    limits = (FLOAT32, FLOAT32)
    if spec.dtype == "bfloat16":
        limits = BFLOAT16, BFLOAT16_GRADIENT
    args = spec.draw(jax.random.key(1)) | {"log_decay": None}
    with dispatch.interpret(SIMULATED):
        check(args, *limits, features=features, chunk=16, implementation="pallas_tpu")


def test_features_of_the_zeros_behind_the_end_may_be_nan():
    """Of unit length: those of zeros are NaN, which once reached all gradients."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    features = lambda q, k: (unit(q), unit(k), jax.nn.log_sigmoid(k) / 4)
    spec = dataclasses.replace(SMALL["grouped"], length=20)
    args = spec.draw(jax.random.key(1)) | {"log_decay": None}
    with dispatch.interpret():
        check(args, features=features, chunk=16, implementation="pallas_tpu")


def test_what_the_kernel_cannot_do_runs_as_xla():
    args = dataclasses.replace(SMALL["linear"], length=4).draw(jax.random.key(0))
    with dispatch.target("tpu"):
        call(args | {"segment_ids": jnp.zeros((1, 4), jnp.int32)})
        with pytest.raises(NotImplementedError, match="pallas_tpu: segments"):
            call(
                args | {"segment_ids": jnp.zeros((1, 4), jnp.int32)}, implementation="pallas_tpu"
            )


def test_a_chunk_fits_the_memory_of_a_step_or_is_refused():
    """Many query heads share keys: the chosen chunk is shorter than what few would get."""
    spec = ArgSpec(length=1024, heads=32, kv_heads=1, dim=256, value_dim=256, gate="none")
    size = lambda chunk: pallas_tpu.step_bytes(32, chunk, 256, 256)
    assert size(256) > pallas_tpu.VMEM > size(16)
    with dispatch.target("tpu"), dispatch.use("pallas_tpu"):
        run = lambda spec, chunk=None: jax.eval_shape(
            partial(call, chunk=chunk), spec.shapes() | {"initial_state": None}
        )
        run(spec)
        run(spec, chunk=16)
        with pytest.raises(NotImplementedError, match="a step of 256 tokens needs .* MiB of VMEM"):
            run(spec, chunk=256)
        with pytest.raises(NotImplementedError, match="chunk 8 is under 16"):
            run(spec, chunk=8)
        wide = dataclasses.replace(spec, heads=128, dim=1024, value_dim=1024)
        with pytest.raises(NotImplementedError, match="no chunk .* a step of 16 tokens needs"):
            run(wide)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("gate", ["channel", "head", "none", "features"])
def test_forward_and_backward_compile_for_tpu(aot_target, gate):
    """A decay per channel, given or made of the keys, at a benchmark shape in bfloat16; in float32
    one per head with SmolLM2's grouped heads, none with grouped heads of whole lanes."""
    spec = BENCH["channel B=2 L=2048 N=16 D=128 bf16"]
    if gate == "head":
        spec = ArgSpec(length=200, heads=9, kv_heads=3, dim=64, value_dim=64, gate=gate, state=True)
    elif gate == "none":
        spec = dataclasses.replace(WIDE, length=200, gate=gate)
    args = {name: x for name, x in spec.shapes().items() if x is not None}
    how = {"implementation": "pallas_tpu"}
    if gate == "features":
        del args["log_decay"]
        how["features"] = features
    run = lambda args: call({"log_decay": None} | args, **how)
    loss = lambda args: sum(jnp.sum(x.astype(jnp.float32)) for x in run(args))
    kernels = lambda f: aot.compile(f, args, target=aot_target).kernels.count("tpu_custom_call")
    assert (kernels(run), kernels(jax.grad(loss))) == (1, 2)
