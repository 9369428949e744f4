"""The Hopper kernels of gated linear attention: their tiles on their own, the kernels interpreted
and compiled, what they refuse."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from recurrence import BFLOAT16, BFLOAT16_GRADIENT, assert_close, call, check

from flora_jax.kernels import aot, dispatch, hopper
from flora_jax.kernels.gated_linear_attention import (
    gated_linear_attention,
    mosaic_gpu,
    tiles,
    tiles64,
    warpgroup,
)
from flora_jax.kernels.gated_linear_attention.arg_specs import BENCH, ArgSpec
from flora_jax.kernels.gated_linear_attention.tiles64 import SIDE, Pair

INTERPRETER = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no public GPU interpreter"
)


class Tile:
    """Shared memory: what is stored is rounded."""

    def __init__(self, x=None):
        self.x = None if x is None else jnp.asarray(x, jnp.bfloat16)


class Plain:
    """The machine of ``tiles64`` with arrays."""

    index = tuple(jax.lax.broadcasted_iota(jnp.int32, (SIDE, SIDE), axis) for axis in (0, 1))

    def product(self, *pairs, start=None):
        operands = [[x.x if isinstance(x, Tile) else x for x in pair] for pair in pairs]
        assert all(x.dtype == jnp.bfloat16 for pair in operands for x in pair)
        total = sum(np.asarray(x, np.float32) @ np.asarray(y, np.float32) for x, y in operands)
        return jnp.asarray(total if start is None else total + start)

    def turn(self, tile):
        return Tile(tile.x.T)

    def read(self, tile):
        return tile.x.astype(jnp.float32)

    def write(self, tile, x):
        tile.x = x.astype(jnp.bfloat16)

    def along(self, vector):
        return jnp.broadcast_to(vector, (SIDE, SIDE))

    def loop(self, count, body, carry):
        for i in range(count):
            carry = body(i, carry)
        return carry


def grid(x):
    """``[64 a, 64 b]`` as tiles ``[a][b]``."""
    rows, columns = (n // SIDE for n in x.shape)
    cut = lambda n: slice(n * SIDE, (n + 1) * SIDE)
    return [[Tile(x[cut(i), cut(j)]) for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_tiles_of_a_chunk_equal_the_chunk(gate):
    """Two tiles a head, as two warpgroups; decays of exp(-50) between small ones."""
    rng, m, scale, half = np.random.default_rng(0), Plain(), 0.1, range(2)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)
    q, k, v, do = (normal(SIDE, 2 * SIDE) for _ in range(4))
    state, d_state = normal(2 * SIDE, 2 * SIDE), normal(2 * SIDE, 2 * SIDE)
    g = None if gate == "none" else np.log(rng.uniform(0.5, 1, (SIDE, 2 * SIDE)))
    if g is not None:
        g = jnp.asarray(np.where(rng.random(g.shape) < 0.1, -50, g), jnp.float32)
        g = g[:, :1] if gate == "head" else g

    def gate_of(u):
        if gate != "channel":
            return tiles64.NoGate() if g is None else tiles64.HeadGate(g[:, 0])
        pair = Pair(Tile(), Tile())
        pair.write(m, g[:, u * SIDE : (u + 1) * SIDE])
        return tiles64.ChannelGate(pair)

    gates = [gate_of(u) for u in half]
    out, after = tiles.forward(q[None] * scale, k, v, g, state)
    later = None
    if g is not None:
        later = jnp.sum(after * d_state, axis=0 if gate == "channel" else None, keepdims=True)
        later = later.reshape(1, -1)
    inputs = q[None] * scale, k, v, g, state, do[None], d_state, later
    dq, dk, dv, dg, before, _ = tiles.backward(*inputs)

    (qs,), (ks,), (vs,), (dos,) = map(grid, (q, k, v, do))
    states, d_states, zs, keys = grid(state), grid(d_state), [Tile(), Tile()], [Tile(), Tile()]
    scan = lambda start, x, y, decay, scale: np.block(
        [
            [
                tiles64.update(m, m.read(start[i][j]), x[j], y[i], gates[j], decay, scale, Tile())
                for j in half
            ]
            for i in half
        ]
    )
    assert_close(scan(states, ks, vs, tiles64.out, 1.0), after, BFLOAT16, "state")
    assert_close(scan(d_states, qs, dos, tiles64.into, scale), before, BFLOAT16, "d state")
    rooms = [x.logs if gate == "channel" else Pair(Tile(), Tile()) for x in gates]
    chunks = [
        tiles64.Chunk(
            qs[u], ks[u], vs, dos, [row[u] for row in states], [row[u] for row in d_states],
            zs[u], keys[u],
        )
        for u in half
    ]  # fmt: skip
    grads = [tiles64.gradient(m, chunks[u], gates[u], rooms[u], scale) for u in half]
    ours = [jnp.concatenate(x, axis=1) for x in zip(*grads) if x[0] is not None]
    ours.append(
        jnp.concatenate(
            [tiles64.value_gradient(m, zs, dos[u], keys, d_states[u]) for u in half], axis=1
        )
    )
    if gate == "head":
        ours[2] = ours[2].sum(axis=1, keepdims=True)
    theirs = [x for x in (dq[0] * scale, dk, dg, dv) if x is not None]
    assert_close(ours, theirs, BFLOAT16_GRADIENT, "gradient")
    gates = [gate_of(u) for u in half]  # the gradient has taken their room
    for u in half:
        tiles64.forward(m, qs[u], ks[u], gates[u], zs[u])
    ours = [tiles64.outputs(m, qs, zs, vs[u], states[u], scale) for u in half]
    assert_close(jnp.concatenate(ours, axis=1), out[0], BFLOAT16, "output")


def test_levels_are_those_of_the_other_backends():
    for bit, (summed, pairs) in zip(reversed(range(tiles64.LEVELS)), tiles.levels(SIDE)):
        late, ours, meet = tiles64.halves(*Plain.index, bit)
        np.testing.assert_array_equal(ours, summed > 0)
        np.testing.assert_array_equal(late & meet, pairs > 0)


class Interpreted(warpgroup.Machine):
    """jax's GPU interpreter has no matrix unit within loops and conditions: products by jnp."""

    def product(self, *pairs, start=None):
        read = lambda x: (x.tile[...].T if isinstance(x, Turned) else x[...]).astype(jnp.float32)
        total = sum(read(x) @ read(y) for x, y in pairs)
        return total if start is None else start + total

    def turn(self, tile):
        return Turned(tile)


@dataclasses.dataclass(frozen=True)
class Turned:
    tile: object


@INTERPRETER
@pytest.mark.parametrize(
    ("gate", "dim", "heads"), [("channel", 128, 1), ("head", 64, 2), ("none", 64, 1)]
)
@pytest.mark.interpreter
def test_interpreted_kernels_equal_the_recurrence(monkeypatch, gate, dim, heads):
    """All but the products: copies, barriers, buffers, the order of chunks, with memory that starts
    as NaN and race detection. With a decay per head the scan's buffer is filled again."""
    monkeypatch.setattr(mosaic_gpu, "Machine", Interpreted)
    if gate == "head":
        monkeypatch.setattr(hopper, "slots", lambda *sizes: 1)
    spec = ArgSpec(
        length=100, heads=heads, kv_heads=1, dim=dim, value_dim=dim, dtype="bfloat16", gate=gate,
        state=True,
    )  # fmt: skip
    with dispatch.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        args = spec.draw(jax.random.key(1), sharpness=4)
        check(args, BFLOAT16, BFLOAT16_GRADIENT, implementation="mosaic_gpu")


def bfloat16(**sizes):
    sizes = {"length": 200, "heads": 4, "kv_heads": 2, "dim": 64, "value_dim": 64} | sizes
    return ArgSpec(**{"dtype": "bfloat16"} | sizes)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (bfloat16(dtype="float32"), {}, "q, k and v in bfloat16, not float32"),
        (bfloat16(value_dim=128), {}, r"heads of 64 or 128 .* alike, not \(64, 128\)"),
        (bfloat16(), {"chunk": 32}, "chunks of 64, not 32"),
        (bfloat16(length=1), {}, "a single token"),
        (bfloat16(length=4), {"segment_ids": jnp.zeros((1, 4), jnp.int32)}, "segments"),
    ],
)
def test_what_cannot_run_says_why(spec, options, message):
    args = spec.shapes()
    run = partial(gated_linear_attention, implementation="mosaic_gpu", **options)
    with (
        dispatch.target("sm90"),
        pytest.raises(NotImplementedError, match="mosaic_gpu: " + message),
    ):
        jax.eval_shape(run, args["q"], args["k"], args["v"], args["log_decay"])


def test_a_refusal_comes_before_the_features():
    features = lambda q, k: pytest.fail("computed")
    run = partial(gated_linear_attention, features=features, implementation="mosaic_gpu")
    with dispatch.target("sm90"), pytest.raises(NotImplementedError, match="in bfloat16"):
        jax.eval_shape(run, *(bfloat16(dtype="float32").shapes()[name] for name in "qkv"))


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_forward_and_backward_compile_for_h100(aot_target, gate):
    """A decay per channel at a benchmark shape; the other gates with grouped heads of 64 and a last
    chunk that is not full."""
    spec = bfloat16(gate=gate, state=True)
    if gate == "channel":
        spec = BENCH["channel B=2 L=2048 N=16 D=128 bf16"]
    args = {name: x for name, x in spec.shapes().items() if x is not None}
    run = lambda args: call({"log_decay": None} | args, implementation="mosaic_gpu")
    loss = lambda args: sum(jnp.sum(x.astype(jnp.float32)) for x in run(args))
    kernels = lambda f: aot.compile(f, args, target=aot_target).kernels.count("mosaic_gpu_v2")
    assert (kernels(run), kernels(jax.grad(loss))) == (2, 3)


@pytest.mark.aot
@pytest.mark.parametrize("aot_target", ["h100"], indirect=True)
def test_heads_that_do_not_fit_are_refused_by_the_compiler_too(aot_target, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "supported", lambda *args: None)
    shapes = bfloat16(dim=256, value_dim=256).shapes()
    run = partial(gated_linear_attention, implementation="mosaic_gpu")
    with pytest.raises(Exception, match="(?i)shared memory|smem|RESOURCE_EXHAUSTED"):
        aot.compile(run, *(shapes[n] for n in "qkv"), shapes["log_decay"], target=aot_target)
