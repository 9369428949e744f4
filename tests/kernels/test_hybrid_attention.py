"""A window and a recurrence in one kernel, against the two ops and against their references."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from recurrence import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_close, features

from flora_jax.core.errors import ConfigError
from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.hybrid_attention import hybrid_attention
from flora_jax.kernels.window_attention.arg_specs import BENCH, Spec

SIMULATED = pltpu.InterpretParams(
    dma_execution_mode="on_wait", uninitialized_memory="nan", detect_races=True
)
GROUPED = Spec(length=300, heads=4, key_heads=2, dim=16, window=64)
CASES = {
    "grouped, three steps, the last short": GROUPED,
    "heads of whole lanes, a short step": Spec(
        length=200, heads=2, key_heads=1, dim=128, window=129
    ),
    "bfloat16": Spec(length=256, heads=2, key_heads=1, dim=128, window=5, dtype="bfloat16"),
}


def run(spec, *args, **options):
    how = {"features": features, "window": spec.window, "weights": (0.5, 0.75)}
    return hybrid_attention(*args, **how, **options)


def draw(spec):
    q, k, v = spec.draw(jax.random.key(1))
    return q, k, v, *spec.draw(jax.random.key(2))[:2]


def agree(spec, implementation):
    def results(args, implementation):
        def loss(*args):
            out = run(spec, *args, implementation=implementation)
            weights = jax.random.normal(jax.random.key(9), out.shape)
            return jnp.sum(weights * out.astype(jnp.float32)), out

        grad = jax.value_and_grad(loss, range(5), has_aux=True)
        (_, out), grads = jax.jit(grad)(*args)
        return out, grads

    args = draw(spec)
    limits = (FLOAT32, FLOAT32)
    if spec.dtype == "bfloat16":
        limits = BFLOAT16, BFLOAT16_GRADIENT
    wanted = results([x.astype(jnp.float32) for x in args], "reference")
    for got, want, limit in zip(results(args, implementation), wanted, limits):
        assert_close(got, jax.tree.map(lambda x, y: x.astype(y.dtype), want, got), limit)


@pytest.mark.parametrize("name", ["grouped, three steps, the last short", "bfloat16"])
def test_two_ops_and_their_sum(name):
    agree(CASES[name], "xla")


@pytest.mark.parametrize("name", CASES)
def test_simulated_tpu_equals_the_references(capfd, name):
    """Memory starts as NaN, so that whatever is read before it is written shows."""
    with dispatch.interpret(SIMULATED):
        agree(CASES[name], "pallas_tpu")
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 130}, "a window of 130 keys; 129 fit"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"length": 1}, "a single token"),
        ({"heads": 128, "key_heads": 1, "dim": 256}, "a step needs .* MiB of VMEM of 96"),
    ],
)
def test_what_the_kernel_cannot_do_runs_as_two_ops(change, message):
    spec = dataclasses.replace(GROUPED, **change)
    shapes = spec.arguments() + spec.arguments()[:2]
    with dispatch.target("tpu"):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda *a: run(spec, *a, implementation="pallas_tpu"), *shapes)
        jax.eval_shape(lambda *a: run(spec, *a), *shapes)


def test_a_chosen_chunk_is_kept():
    args = draw(GROUPED)
    refused = pytest.raises(NotImplementedError, match="chunks of 64, not of 128")
    with refused, dispatch.interpret():
        run(GROUPED, *args, chunk=64, implementation="pallas_tpu")
    with pytest.raises(ConfigError, match="chunk must be a power of two, not 24"):
        run(GROUPED, *args, chunk=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_plain": (1, 32, 4, 16)}, r"k_plain must be \(1, 32, 2, 16\)"),
        ({"v": (1, 40, 2, 16)}, r"v must be \(1, 32, 2, 16\)"),
        ({"k": (1, 32, 3, 16), "k_plain": (1, 32, 3, 16)}, "4 query heads are no multiple of 3"),
        ({"k": (1, 40, 2, 16), "k_plain": (1, 40, 2, 16), "v": (1, 40, 2, 16)}, "k must be"),
        ({"window": 0}, "needs a window and a token: 0, 32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    """On a TPU too, whose kernel would take some of it for other shapes."""
    heads, key_heads = (1, 32, 4, 16), (1, 32, 2, 16)
    shapes = {"q": heads, "k": key_heads, "v": key_heads, "q_plain": heads, "k_plain": key_heads}
    spec = dataclasses.replace(GROUPED, window=change.get("window", 4))
    arrays = [jax.ShapeDtypeStruct(change.get(name, x), jnp.float32) for name, x in shapes.items()]
    with dispatch.target("tpu"), pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda *a: run(spec, *a), *arrays)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_backward_compile_for_tpu(aot_target, dtype):
    """The benchmark's shape; SmolLM2's heads in float32."""
    spec = BENCH["B=2 L=4096 N=16 K=4 D=128 w=64 bf16"]
    if dtype == "float32":
        spec = Spec(length=1000, heads=9, key_heads=3, dim=64, window=64)
    args = spec.arguments() + spec.arguments()[:2]
    forward = lambda *a: run(spec, *a, implementation="pallas_tpu")
    loss = lambda *a: forward(*a).astype(jnp.float32).sum()
    kernels = lambda f: aot.compile(f, *args, target=aot_target).kernels.count("tpu_custom_call")
    assert (kernels(forward), kernels(jax.grad(loss, range(5)))) == (1, 2)
