"""Programs compiled for devices that this machine does not have."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import aot, costs, dispatch
from flora_jax.kernels.costs import DEVICES

X = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
Y = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)


def test_unknown_targets_are_refused():
    with pytest.raises(ConfigError, match="'v5e'; nearest: tpu_v5e"):
        aot.compile(lambda x: x, X, target="v5e")


def test_a_missing_wheel_names_the_extra(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"h100 needs the wheel jax-cuda13-plugin: .*\[aot\]"):
        aot.compile(lambda x: x, X, target="h100")


def test_a_plugin_for_another_jax_is_refused(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(aot.metadata, "version", lambda name: "0.1")
    assert "0.1 is not for jax" in aot.missing("h100")


@pytest.mark.aot
def test_a_product_compiles_and_tells_its_cost(aot_target):
    got = aot.compile(lambda x, y: x @ y, X, Y, target=aot_target)
    assert got.flops == pytest.approx(2 * 256 * 512 * 256, rel=0.1)
    assert got.bytes >= 2 * (2 * 256 * 512 + 256 * 256)
    assert (got.arguments, got.outputs) == (2 * 2 * 256 * 512, 2 * 256 * 256)
    assert aot_target in DEVICES


@pytest.mark.aot
def test_ops_inside_see_the_target(aot_target):
    seen = []

    def f(x, scale):
        seen.append(dispatch.platform())
        return scale * x

    aot.compile(f, X, target=aot_target, scale=2.0)
    assert set(seen) == {aot.TARGETS[aot_target].dispatch}


def tpu_copy(rows):
    def body(x_ref, o_ref, scratch):
        scratch[: x_ref.shape[0]] = x_ref[...]
        o_ref[...] = scratch[: x_ref.shape[0]]

    return lambda x: pl.pallas_call(
        body, out_shape=x, scratch_shapes=[pltpu.VMEM((rows, 512), jnp.bfloat16)]
    )(x)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
def test_a_tpu_kernel_that_does_not_fit_is_refused(aot_target):
    assert "tpu_custom_call" in aot.compile(tpu_copy(256), X, target=aot_target).kernels
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        aot.compile(tpu_copy(1 << 18), X, target=aot_target)


def gpu_copy(rows):
    def body(x_ref, o_ref, scratch, barrier):
        tile = scratch.at[pl.ds(0, 256)]
        plgpu.copy_gmem_to_smem(x_ref, tile, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(tile, o_ref)
        plgpu.wait_smem_to_gmem(0)

    return lambda x: plgpu.kernel(
        body,
        out_type=x,
        scratch_types=[plgpu.SMEM((rows, 128), jnp.bfloat16), plgpu.Barrier()],
    )(x)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_a_gpu_kernel_that_does_not_fit_is_refused(aot_target):
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    assert "mosaic_gpu_v2" in aot.compile(gpu_copy(256), x, target=aot_target).kernels
    with pytest.raises(Exception, match="(?i)shared memory|smem|RESOURCE_EXHAUSTED"):
        aot.compile(gpu_copy(1 << 12), x, target=aot_target)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_a_gpu_kernel_counts_with_what_it_declares(aot_target):
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)

    def f(x, work):
        with costs.declared(work):
            return gpu_copy(256)(x)

    plain, more = (
        aot.compile(f, x, target=aot_target, work=costs.Work(flops=n, bytes=10 * n))
        for n in (0, 1e9)
    )
    assert (more.flops - plain.flops, more.bytes - plain.bytes) == (1e9, 1e10)
    assert (plain.kernel_bytes, more.kernel_bytes) == (0, 1e10)


@pytest.mark.aot
def test_every_target_in_one_process_that_asks_for_no_platform():
    """As ``flora bench kernels`` does; there is no cuDNN, which CUDA's plugin asks for."""
    targets = [name for name in aot.TARGETS if not aot.missing(name)]
    code = (
        "import jax; from flora_jax.kernels import aot;"
        f"[aot.compile(lambda x: 2 * x, jax.ShapeDtypeStruct((8, 128), 'float32'), target=t)"
        f" for t in {targets}]; print('compiled')"
    )
    unasked = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=unasked, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
