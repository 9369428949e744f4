"""Attention over a window of the last keys: XLA form and TPU kernels against all pairs masked."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from recurrence import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_close

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.window_attention import window_attention
from flora_jax.kernels.window_attention.arg_specs import BENCH, Spec

SIMULATED = pltpu.InterpretParams(
    dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True
)
GROUPED = Spec(batch=2, length=200, heads=4, key_heads=2, dim=8, window=64)


def run(spec, *args, **options):
    marks = dict(zip(("valid", "segment_ids"), args[3:]))
    return window_attention(*args[:3], window=spec.window, **marks, **options)


def results(spec, args, **options):
    """o, lse, top and the gradients of a loss that weighs o and lse."""

    def loss(q, k, v):
        o, lse, top = run(spec, q, k, v, *args[3:], **options)
        # A query without keys has -inf, of which the cosine is NaN, its gradient too.
        weighed = jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0).sum()
        weights = jax.random.normal(jax.random.key(9), o.shape)
        lse, top = jnp.where(jnp.isfinite(lse), lse, -9), jnp.maximum(top, -9)
        return jnp.sum(weights * o.astype(jnp.float32)) + weighed, (o, lse, top)

    grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, outputs), grads = jax.jit(grad)(*args[:3])
    return outputs, grads


def agree(spec, implementation, seed=0, **options):
    args = spec.draw(jax.random.key(seed))
    limits = (FLOAT32, FLOAT32)
    if spec.dtype == "bfloat16":
        limits = BFLOAT16, BFLOAT16_GRADIENT
    exact = [x.astype(jnp.float32) for x in args[:3]]
    wanted = results(spec, (*exact, *args[3:]), implementation="reference")
    options["implementation"] = implementation
    for got, want, limit in zip(results(spec, args, **options), wanted, limits):
        want = jax.tree.map(lambda x, y: x.astype(y.dtype), want, got)
        assert_close(got, want, limit)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_any_length_equals_all_pairs_masked(length):
    agree(dataclasses.replace(GROUPED, length=length), "xla")


@pytest.mark.parametrize("window", [1, 5, 100])
def test_other_windows_with_segments_and_padding(window):
    """Shared tokens, queries without keys; one key, less than a block, more than one."""
    agree(dataclasses.replace(GROUPED, length=150, window=window, marked=True), "xla")


def test_bfloat16():
    agree(dataclasses.replace(GROUPED, dtype="bfloat16"), "xla")


def test_a_window_of_the_whole_length_is_causal_softmax():
    args = GROUPED.draw(jax.random.key(2))
    wanted = jax.nn.dot_product_attention(*args, is_causal=True)
    for window in (200, 1000):
        o, _, _ = window_attention(*args, window=window)
        np.testing.assert_allclose(o, wanted, atol=2e-6)


@pytest.mark.parametrize("cut", [30, 199])
def test_keys_before_the_first_query(cut):
    """As a cache leaves them: the last queries of a sequence, down to one."""
    spec = dataclasses.replace(GROUPED, marked=True)
    q, *rest = spec.draw(jax.random.key(3))
    call = jax.jit(lambda *a, **k: run(spec, *a, **k), static_argnames="implementation")
    whole = call(q, *rest)
    for implementation in ("xla", "reference"):
        late = call(q[:, cut:], *rest, implementation=implementation)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[:, cut:], atol=1e-5), late, whole)


def test_vmap_equals_a_loop():
    spec = dataclasses.replace(GROUPED, batch=1, length=70)
    many = [spec.draw(jax.random.key(i)) for i in range(2)]
    stacked = [jnp.stack(x) for x in zip(*many)]
    grad = jax.jit(jax.grad(lambda *a: jnp.sum(run(spec, *a)[0] ** 2), (0, 1, 2)))
    loop = [jnp.stack(x) for x in zip(*(grad(*a) for a in many))]
    for x, y in zip(jax.vmap(grad)(*stacked), loop):
        np.testing.assert_allclose(x, y, atol=1e-5)


SHARDED = """
import dataclasses, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from flora_jax.kernels.window_attention.arg_specs import Spec
from test_window_attention import GROUPED, run
from recurrence import FLOAT32, assert_close

mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
spec = dataclasses.replace(GROUPED, length=70, marked=True)
args = spec.draw(jax.random.key(0))
heads, tokens = P("b", None, "h"), P("b")
spread = jax.shard_map(lambda *a: run(spec, *a)[:2], mesh=mesh,
                       in_specs=(heads,) * 3 + (tokens,) * 2, out_specs=(heads, heads))
def loss(f):
    def one(q, k, v):
        o, lse = f(q, k, v, *args[3:])[:2]
        return jnp.sum(o**2) + jnp.sum(jnp.where(lse > -99, lse, 0) ** 2)
    return one
grads = [jax.jit(jax.grad(loss(f), (0, 1, 2)))(*args[:3])
         for f in (spread, lambda *a: run(spec, *a))]
assert_close(*grads, FLOAT32)
"""


def test_shard_map_over_batch_and_heads():
    """On four simulated devices, which need a process of their own."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.path.dirname(__file__),
    }
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=env)


def test_memory_grows_with_the_length_not_its_square():
    def per_token(length):
        spec = dataclasses.replace(GROUPED, length=length)
        f = jax.grad(lambda *a: jnp.sum(run(spec, *a)[0]), (0, 1, 2))
        compiled = jax.jit(f).lower(*spec.arguments()).compile()
        return compiled.memory_analysis().temp_size_in_bytes / length

    assert per_token(4096) < 1.1 * per_token(1024)


SMALL = {
    "grouped, three blocks, the last short": Spec(
        length=300, heads=4, key_heads=2, dim=8, window=64
    ),
    "heads of whole lanes, a short last block": Spec(
        length=200, heads=2, key_heads=1, dim=128, window=64
    ),
    "segments and padding": Spec(length=200, heads=2, key_heads=2, dim=16, window=20, marked=True),
    "a window of several tiles": Spec(length=600, heads=1, key_heads=1, dim=128, window=200),
    "one token": Spec(length=1, heads=2, key_heads=1, dim=128, window=64),
    "bfloat16": Spec(
        length=200, heads=2, key_heads=1, dim=128, window=64, dtype="bfloat16", marked=True
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_simulated_tpu_equals_all_pairs_masked(capfd, name):
    """Memory starts as NaN, so that whatever is read before it is written shows."""
    block = 256 if SMALL[name].window > 129 else 128
    with dispatch.interpret(SIMULATED):
        agree(SMALL[name], "pallas_tpu", seed=1, block=block)
    assert "RACE" not in capfd.readouterr().out


def test_a_step_of_several_tiles():
    """Two tiles of queries in a step, with and without keys of the block before."""
    spec = Spec(length=500, heads=1, key_heads=1, dim=128, window=64)
    with dispatch.interpret(SIMULATED):
        agree(spec, "pallas_tpu", block=256)


def test_what_the_kernel_cannot_do_runs_as_xla():
    q, k, v = GROUPED.draw(jax.random.key(0))
    on_tpu = lambda *a, window=64, **options: run(
        dataclasses.replace(GROUPED, window=window), *a, implementation="pallas_tpu", **options
    )
    with dispatch.target("tpu"):
        # No longer than the sequence.
        jax.eval_shape(partial(on_tpu, window=1000), q, k, v)
        run(GROUPED, q[:, -1:], k, v)
        with pytest.raises(NotImplementedError, match="keys before the first query"):
            on_tpu(q[:, -1:], k, v)
        long = dataclasses.replace(GROUPED, length=600).arguments()
        with pytest.raises(NotImplementedError, match="a window of 514 keys; 513 fit"):
            jax.eval_shape(partial(on_tpu, window=514), *long)
        with pytest.raises(NotImplementedError, match="a block of 192 is no multiple of 128"):
            on_tpu(q, k, v, block=192)
        with pytest.raises(NotImplementedError, match="a block of 256 is no multiple of 512"):
            jax.eval_shape(partial(on_tpu, window=513, block=256), *long)
        with pytest.raises(NotImplementedError, match="a step of 65536 needs"):
            on_tpu(q, k, v, block=65536)
        with pytest.raises(NotImplementedError, match="dtype float16"):
            on_tpu(*(x.astype(jnp.float16) for x in (q, k, v)))
        large = Spec(length=512, heads=64, key_heads=1, dim=256, window=64).arguments()
        with pytest.raises(NotImplementedError, match="a step of 128 needs .* MiB of VMEM of 96"):
            jax.eval_shape(on_tpu, *large)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 4, 2, 8))}, "3 query heads are no multiple of 2 key heads"),
        ({"v": jnp.zeros((1, 5, 3, 8))}, r"v must be \(1, 4, 3, 8\)"),
        ({"k": jnp.zeros((1, 3, 3, 8))}, "4 queries, the last at the last of 3 keys"),
        ({"valid": jnp.ones((1, 3))}, r"valid must be \(1, 4\)"),
        ({"window": 0}, "needs a window and a token: 0, 4"),
        ({"q": jnp.zeros((4, 3, 8))}, r"q must be \[B, T, heads, channels\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x = jnp.zeros((1, 4, 3, 8))
    args = {"q": x, "k": x, "v": x, "window": 2} | change
    with pytest.raises(ConfigError, match=message):
        window_attention(args.pop("q"), args.pop("k"), args.pop("v"), **args)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("kind", ["bfloat16", "marked", "wide", "float32"])
def test_forward_and_backward_compile_for_tpu(aot_target, kind):
    """The benchmark's shapes; SmolLM2's heads in float32 with segments."""
    spec = BENCH[f"B=2 L=4096 N=16 K=4 D=128 w={512 if kind == 'wide' else 64} bf16"]
    if kind == "float32":
        spec = Spec(length=1000, heads=9, key_heads=3, dim=64, window=64)
    args = spec.arguments()
    if kind in ("marked", "float32"):
        tokens = args[0].shape[:2]
        marks = (jax.ShapeDtypeStruct(tokens, t) for t in (jnp.bool_, jnp.int32))
        args = *args, *marks
    forward = lambda *a: run(spec, *a, implementation="pallas_tpu")
    loss = lambda *a: forward(*a)[0].astype(jnp.float32).sum()
    kernels = lambda f: aot.compile(f, *args, target=aot_target).kernels.count("tpu_custom_call")
    assert (kernels(forward), kernels(jax.grad(loss, (0, 1, 2)))) == (1, 1)
