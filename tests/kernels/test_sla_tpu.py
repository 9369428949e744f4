"""The TPU kernels of SLA's linear branch: simulated memory, races, compiles without a device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from flora_jax.kernels import aot, dispatch
from flora_jax.kernels.sla import SLAConfig, branches, reference, sla

CFG = SLAConfig(critical=0.3, block_q=128, block_k=16)
PAPER = SLAConfig(variant="paper", critical=0.3, negligible=0.3, block_q=16, block_k=16)
KERNELS = ("pallas_tpu", "xla")
"""The softmax branch takes no blocks of 16 queries and runs as XLA; the linear one does not."""


@pytest.fixture(autouse=True)
def simulator(capfd):
    """Every kernel of a test runs in the simulator, which prints the races that it finds."""
    with dispatch.interpret(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    assert "RACE" not in capfd.readouterr().out


def problem(tokens=150, keys=75, heads=2, key_heads=1, width=128, batch=1, dtype="float32"):
    a, b, c, d, e = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, t, n: jax.random.normal(key, (batch, t, n, width)).astype(dtype)
    kernel = jax.random.normal(d, (width, width)) / width**0.5
    params = {"kernel": kernel, "bias": jax.random.normal(e, (width,))}
    return draw(a, tokens, heads), draw(b, keys, key_heads), draw(c, keys, key_heads), params


def ratio(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.isfinite(x).all()
    return np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-30))


def results(f, arguments):
    def loss(*arguments):
        o = f(*arguments).astype(jnp.float32)
        # Cotangents that bfloat16 holds exactly.
        weights = jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(jnp.bfloat16)
        return jnp.sum(o * weights), o

    grads, o = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arguments)
    return o, jax.tree.leaves(grads)


def agree(cfg, arguments, outputs=1e-5, grads=1e-5, **how):
    """With dense masks in float32; the output and all five gradients."""
    exact = (*(x.astype(jnp.float32) for x in arguments[:3]), arguments[3])
    expected = results(lambda *x: reference.sla(*x, cfg), exact)
    got = results(lambda *x: sla(*x, cfg, implementation=KERNELS, **how), arguments)
    assert ratio(got[0], expected[0]) < outputs
    for x, like, y in zip(got[1], jax.tree.leaves(arguments), expected[1]):
        assert x.dtype == like.dtype and ratio(x, y) < grads


@pytest.mark.parametrize(("width", "features"), [(8, "elu1"), (128, "softmax")])
def test_float32_in_steps_with_tails(width, features):
    """Heads that are copied and heads in place; features of nothing that are not zero."""
    agree(dataclasses.replace(CFG, features=features), problem(width=width), tokens=64)


def test_bfloat16_in_one_step_of_a_batch():
    agree(CFG, problem(dtype="bfloat16", batch=2), 5e-3, 8e-3)


@pytest.mark.parametrize(
    ("width", "features", "critical"), [(8, "relu", 0.3), (128, "elu1", 0.3), (8, "softmax", 1.0)]
)
def test_marginal_blocks_in_steps_with_tails(width, features, critical):
    """Queries all of whose features are 0, and rows that no marginal block is left to: both 0."""
    cfg = dataclasses.replace(PAPER, features=features, critical=critical)
    agree(cfg, problem(tokens=300, keys=205, width=width))


def test_marginal_blocks_in_bfloat16():
    agree(
        PAPER,
        problem(tokens=200, keys=75, heads=4, key_heads=2, batch=2, dtype="bfloat16"),
        5e-3,
        8e-3,
    )


@pytest.mark.parametrize("cfg", [CFG, PAPER], ids=lambda cfg: cfg.variant)
def test_the_branch_alone_and_its_gradients(cfg):
    """For a projection that is no plain array: in float32, whatever q is."""

    def projected(q, k, v, params, how):
        return branches(q, k, v, cfg, implementation=how)[1] @ params["kernel"]

    arguments = problem(width=8)
    expected, got = (
        results(lambda *x, how=how: projected(*x, how), arguments) for how in ("xla", KERNELS)
    )
    assert all(ratio(x, y) < 1e-5 for x, y in zip(got[1], expected[1]) if np.any(y))
    *arrays, _ = problem(width=8, dtype="bfloat16")
    low = jax.eval_shape(lambda: branches(*arrays, cfg, implementation=KERNELS)[1])
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("cfg", [CFG, PAPER], ids=lambda cfg: cfg.variant)
def test_vmap_is_an_axis_of_the_grid(cfg):
    """In the plain interpreter: the simulator knows no such axis."""
    *many, params = problem(width=8, batch=2)
    one = lambda q, k, v: sla(q[None], k[None], v[None], params, cfg, implementation=KERNELS)
    with dispatch.interpret(True):
        got = jax.vmap(one)(*many)[:, 0]
    expected = sla(*many, params, cfg, implementation="xla")
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_the_kernels_cannot_do_runs_as_xla():
    q, k, v, params = problem(width=8, dtype="float16")
    with dispatch.target("tpu"):
        sla(q, k, v, params, CFG)
        with pytest.raises(NotImplementedError, match="sla: pallas_tpu: float32 or bfloat16, not"):
            sla(q, k, v, params, CFG, implementation="pallas_tpu")
        many = jax.eval_shape(lambda: problem(heads=256, width=1024))
        with pytest.raises(NotImplementedError, match="a step of 16 needs .* MiB of VMEM of 48"):
            jax.eval_shape(lambda *x: sla(*x, CFG, implementation="pallas_tpu"), *many)
        few = jax.eval_shape(lambda: problem())
        forced = lambda n: lambda *x: sla(*x, CFG, implementation="pallas_tpu", tokens=n)
        with pytest.raises(NotImplementedError, match="a step of 12 tokens is no multiple of 8"):
            jax.eval_shape(forced(12), *few)
        cfg = dataclasses.replace(CFG, variant="sla1")
        for message, changes, sizes in (
            ("blocks 128 x 12, heads of 8: multiples of 8 and 8", {"block_k": 12}, {}),
            ("blocks 512 x 16: at most 256", {"block_q": 512}, {}),
            ("a head's sums need .* MiB of VMEM of 90", {}, {"keys": 1 << 14, "width": 128}),
        ):
            few = jax.eval_shape(lambda sizes=sizes: problem(**{"width": 8} | sizes))
            one = dataclasses.replace(cfg, **changes)
            with pytest.raises(NotImplementedError, match=message):
                jax.eval_shape(lambda *x, cfg=one: sla(*x, cfg, implementation="pallas_tpu"), *few)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["tpu_v5e", "tpu_v6e"], indirect=True)
@pytest.mark.parametrize("variant", ["main", "sla1"])
@pytest.mark.parametrize("features", ["softmax", "elu1", "relu"])
def test_forward_and_backward_compile_for_tpu(aot_target, features, variant):
    """The benchmark's heads in bfloat16; grouped ones in float32, copied, and with larger blocks
    in bfloat16, in place."""
    cfg = SLAConfig(features=features, variant=variant)
    sizes = {"heads": 4, "key_heads": 4, "dtype": "bfloat16"}
    if features == "elu1":
        sizes = {"heads": 9, "key_heads": 3, "width": 64}
    elif features == "relu":
        sizes |= {"heads": 6, "key_heads": 2}
        cfg = dataclasses.replace(cfg, block_q=256, block_k=128)
    shapes = jax.eval_shape(lambda: problem(tokens=3000, keys=2999, **sizes))
    run = lambda *x: sla(*x, cfg, implementation="pallas_tpu")
    loss = lambda *x: run(*x).astype(jnp.float32).sum()
    with dispatch.interpret(False):
        found = [
            aot.compile(f, *shapes, target=aot_target).kernels.count("tpu_custom_call")
            for f in (run, jax.grad(loss, (0, 1, 2, 3)))
        ]
    # Softmax is one forward and two more in the gradient; of ``main`` the branch is two each way,
    # of which the gradient needs the first of the forward pass, of ``sla1`` one.
    assert found == ([3, 6] if variant == "main" else [2, 4])
