"""Every adapter case and every kind of layer that the contracts cross.

Hundreds of cases, whose time is XLA's: NumPy makes the values, and what a contract computes is one
jitted function, because each eager operation on a new shape is a program to compile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.paths import block_indices
from flora_jax.core.registry import method_of
from flora_jax.core.spec import KernelSpec

# Name -> (adapter, trained numbers on a dense 12x8 kernel).
ADAPTERS: dict[str, tuple[Any, int]] = {
    "LoRA": (flora.LoRA(rank=4, alpha=8), 4 * 20),
    "LoRA-rs-gaussian": (flora.LoRA(rank=4, rslora=True, initializer="gaussian"), 4 * 20),
    "DoRA": (flora.DoRA(rank=3, alpha=6), 3 * 20 + 8),
    "PiSSA": (flora.PiSSA(rank=3, alpha=6), 3 * 20),
    "OLoRA": (flora.OLoRA(rank=3, alpha=6), 3 * 20),
    "FLoRA": (flora.FLoRA(ranks=2), 12 * 2 + 8 * 2 + 4),
    "NOLA": (flora.NOLA(rank=2, k=10, l=7, chunk=4), 17),
    "Hydra": (flora.Hydra(rank_parallel=2, rank_sequential=3), 2 * 20 + 2 * 3 * 8),
    "Hydra-parallel": (flora.Hydra(rank_parallel=2, rank_sequential=0), 2 * 20),
    "Hydra-sequential": (flora.Hydra(rank_parallel=0, rank_sequential=3), 2 * 3 * 8),
    "VeRA": (flora.VeRA(rank=5), 5 + 8),
    "VeRA-stored": (flora.VeRA(rank=5, stored=True), 5 + 8),
    "IA3": (flora.IA3(), 8),
    "IA3-input": (flora.IA3(scale="input"), 12),
    "SVFit": (flora.SVFit(), 8),
    "SVFit-rank": (flora.SVFit(rank=3), 3),
    "SoKA": (flora.SoKA(rank=2), 2 * (3 * 2 + 4 * 4)),
    "LoHa": (flora.LoHa(rank=2), 2 * 2 * 20),
    "LoHa-effective": (flora.LoHa(rank=2, effective_conv=True), 2 * 2 * 20),
    "LoKr": (flora.LoKr(rank=1, alpha=2), 3 * 2 + (4 + 4)),
    "LoKr-full": (flora.LoKr(rank=4, decompose_factor=2), 2 * 2 + 6 * 4),
    "LoKr-both": (
        flora.LoKr(rank=1, decompose_both=True, decompose_factor=4, effective_conv=True),
        (4 + 4) + (3 + 2),
    ),
    "Replace": (flora.Replace(), 96),
    "Bottleneck": (flora.Bottleneck(bottleneck=3, activation="swish"), 2 * 3 * 8 + 3 + 8),
    "Compacter": (flora.Compacter(bottleneck=4, n=2), 2 * (8 + 4) + 4 + 8 + 2**3),
    "Compacter-phm": (
        flora.Compacter(bottleneck=4, n=2, factorized=False, shared=False),
        2 * 8 * 4 // 2 + 4 + 8 + 2 * 2**3,
    ),
    "EVA": (flora.EVA(rank=4), 4 * 20),
    "EVA-white": (flora.EVA(rank=3, alpha=6, center=False, whiten=True), 3 * 20),
    "KORE": (flora.KORE(rank=3, scale=0.5), 3 * 8),
    "KORE-both": (flora.KORE(rank=3, train_a=True), 3 * 20),
    "MiSS": (flora.MiSS(rank=4), 4 * 8),
    "MiSS-mini": (flora.MiSS(rank=5, mini_r=2), 5 * 2),
    "MiSS-out": (flora.MiSS(rank=3, share="out"), 3 * 12),
    "Bone": (flora.Bone(rank=4), 4 * 8),
    "Bone-col": (flora.Bone(rank=4, group="col"), 4 * 12),
    "OFT": (flora.OFT(block_size=4), 3 * 6),
    "OFT-shared": (flora.OFT(blocks=2, block_share=True, neumann_terms=0), 15),
    "VLoRA": (
        flora.VLoRA(rank=2, alpha=4, tokens=3, features=4, width=8, depth=1, heads=2),
        2 * 8 + (4 * 8 + 8 + 3 * 8) + 8 + (2 * (4 * 64 + 32) + 8 * 64 + 40 + 48) + 16 + 9 * 12 * 2,
    ),
    "MASA": (flora.MASA(atoms=2, start="pca"), 2 * 96 + 2 * 2),
    "MASA-mlp": (
        flora.MASA(atoms=2, start="pca", coefficients="mlp", embedding=3, hidden=4, rank=1),
        2 * 96 + 2 * 3 + (12 + 4) + (16 + 4) + (8 + 2) + 2 * 20,
    ),
}
# Trained tokens and attention entries act through whole models only: tests/adapters/test_prompts.py
# has their contracts (counts, JSON, gradients, scan, remat, rows, named sums, bf16, low bits).
IN_MODELS = {flora.PromptTuning, flora.PrefixTuning}
# Methods of a scanned stack: their layer is two of a kind in a stack; an unrolled model is refused.
NEEDS_STACK = {"MASA", "MASA-mlp"}
# Arrays without a gradient by construction: softmax does not see a key's bias, and the one query
# of an unstacked weight attends to itself alone.
NO_GRADIENT = {"VLoRA": r"(kernel|embedding):(cross\.key\.bias|self\.(key|query)\..*)"}
# Methods that start near the identity, not at it: the largest change of the output at init, as a
# share of its norm. What their papers and codes do; see docs/methods.md.
NOT_IDENTITY = {"Bottleneck": 1e-3, "Compacter": 1e-3, "Compacter-phm": 1e-3}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel of some kind and the call that uses it."""

    shape: tuple[int, ...]
    x: Callable[[], jax.Array]
    call: Callable[[jax.Array, Any], jax.Array]
    spec: KernelSpec
    name: str = "kernel"
    bias: int | None = None

    @property
    def n_out(self) -> int:
        """Trailing axes of the output that are the kernel's."""
        return len(self.spec.out_axes)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    """Random values without a program."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def _x(*shape: int) -> Callable[[], jax.Array]:
    return lambda: normal(7, *shape)


def _ids() -> jax.Array:
    return jnp.array([[0, 3, 11], [5, 5, 1]])


LAYERS: dict[str, Layer] = {
    "dense": Layer((12, 8), _x(3, 12), ops.dot, KernelSpec.dense(), bias=8),
    "einsum-out": Layer(
        (12, 2, 4),
        _x(2, 3, 12),
        lambda x, w: ops.einsum("BTD,DNH->BTNH", x, w),
        KernelSpec.einsum("BTD,DNH->BTNH"),
    ),
    "einsum-in": Layer(
        (3, 4, 8),
        _x(2, 3, 3, 4),
        lambda x, w: ops.einsum("BTNH,NHD->BTD", x, w),
        KernelSpec.einsum("BTNH,NHD->BTD"),
    ),
    "experts": Layer(
        (2, 12, 8),
        _x(2, 3, 12),
        lambda x, w: ops.einsum("EBD,EDF->EBF", x, w),
        KernelSpec.einsum("EBD,EDF->EBF"),
    ),
    "conv": Layer(
        (3, 3, 4, 8),
        _x(2, 6, 6, 4),
        lambda x, w: ops.conv(x, w, strides=2),
        KernelSpec.conv(2),
        bias=8,
    ),
    "conv1d": Layer(
        (3, 4, 8),
        _x(2, 9, 4),
        lambda x, w: ops.conv(x, w, padding="VALID", rhs_dilation=2),
        KernelSpec.conv(1),
    ),
    "conv-groups": Layer(
        (3, 3, 4, 8),
        _x(2, 6, 6, 8),
        lambda x, w: ops.conv(x, w, groups=2),
        KernelSpec.conv(2, groups=2),
    ),
    "conv-transpose": Layer(
        (3, 3, 4, 8),
        _x(2, 5, 5, 4),
        lambda x, w: ops.conv(x, w, strides=2, transpose=True),
        KernelSpec.conv(2, transpose=True),
    ),
    "embedding": Layer((12, 8), _ids, ops.embed, KernelSpec.embedding(), name="embedding"),
    "tied-head": Layer((12, 8), _x(3, 8), ops.attend, KernelSpec.embedding(), name="embedding"),
}

# Combinations that a method refuses, each with a PlanError; all others must work.
REFUSED = {
    ("NOLA", "experts"),
    ("NOLA", "conv-groups"),
    ("VeRA", "experts"),
    ("VeRA", "conv-groups"),
    ("VeRA-stored", "experts"),
    ("VeRA-stored", "conv-groups"),
    ("PiSSA", "embedding"),
    ("PiSSA", "tied-head"),
    ("OLoRA", "embedding"),
    ("OLoRA", "tied-head"),
    ("IA3-input", "embedding"),
    ("IA3-input", "tied-head"),
    ("IA3-input", "conv-groups"),
    ("VLoRA", "experts"),
    ("VLoRA", "conv-groups"),
    ("MASA-mlp", "experts"),
    ("MASA-mlp", "conv-groups"),
    ("MASA-mlp", "embedding"),
    ("MASA-mlp", "tied-head"),
    ("Bottleneck", "embedding"),
    ("Bottleneck", "tied-head"),
    ("Compacter", "embedding"),
    ("Compacter", "tied-head"),
    ("Compacter-phm", "embedding"),
    ("Compacter-phm", "tied-head"),
    ("EVA", "embedding"),
    ("EVA", "tied-head"),
    ("EVA-white", "embedding"),
    ("EVA-white", "tied-head"),
    ("KORE", "embedding"),
    ("KORE", "tied-head"),
    ("KORE-both", "embedding"),
    ("KORE-both", "tied-head"),
    ("Bone", "embedding"),
    ("Bone", "tied-head"),
    ("Bone-col", "embedding"),
    ("Bone-col", "tied-head"),
}
PAIRS = [(a, l) for a in ADAPTERS for l in LAYERS if (a, l) not in REFUSED]


def layer_of(name: str, kind: str) -> Layer:
    """The layer a case is tried on; two of a kind, added up, where a method needs a stack."""
    layer = LAYERS[kind]
    if name not in NEEDS_STACK:
        return layer

    def call(x, w):
        def add(y, item):
            factor, one = item
            new = layer.call(x, one)
            return y + factor.astype(new.dtype) * new, None

        like = jax.eval_shape(layer.call, x, jax.ShapeDtypeStruct(layer.shape, w.dtype))
        return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), (jnp.array([1.0, -0.5]), w))[0]

    spec = dataclasses.replace(layer.spec, stack_ndim=1)
    return dataclasses.replace(layer, shape=(2, *layer.shape), spec=spec, call=call, bias=None)


def features(x: jax.Array) -> jax.Array:
    """What per-example methods make weights of, for every row of an input."""
    return normal(13, len(x), 3, 4)


def bind(params: Any, adapters: Any, plan: Any, x: jax.Array, **options: Any) -> Any:
    """``flora.bind`` for an input, with the features of its rows."""
    return flora.bind(params, adapters, plan, example=features(x), **options)


def merged_rows(params: Any, adapters: Any, plan: Any, x: jax.Array, **options: Any) -> Any:
    """``(rows of x, merged parameters)``: all rows at once, or one by one where weights differ."""
    plans = plan.values() if isinstance(plan, dict) else [plan]
    differ = any(pool.adapter.per_example for one in plans for pool in one.pools)
    for rows in [slice(n, n + 1) for n in range(len(x))] if differ else [slice(None)]:
        bound = flora.bind(params, adapters, plan, example=features(x)[rows], **options)
        yield rows, flora.materialize(bound)


def base_params(layer: Layer, dtype=jnp.float32) -> dict[str, Any]:
    params = {layer.name: normal(3, *layer.shape, dtype=dtype)}
    if layer.bias:
        params["bias"] = normal(4, layer.bias, dtype=dtype)
    return params


def make_plan(layer: Layer, adapter: Any, params: Any) -> flora.Plan:
    return flora.plan(params, {layer.name: adapter}, specs={layer.name: layer.spec})


def make_stats(plan: flora.Plan) -> dict[str, dict[str, jax.Array]]:
    """What calibration would find on random inputs; of each layer the same, scanned or not."""

    def one(entry, layer: int) -> dict[str, np.ndarray]:
        *batch, n_in, _ = entry.spec.unstacked().canonical_shape(entry.kernel_shape)
        x = np.random.default_rng(layer).normal(size=(*batch, 2 * n_in, n_in)) + 0.5
        found = {"gram": np.swapaxes(x, -1, -2) @ x, "sum": x.sum(-2), "count": np.array(2 * n_in)}
        return {name: found[name].astype(np.float32) for name in entry.adapter.statistics}

    def stacked(entry) -> dict[str, np.ndarray]:
        if not entry.stack:
            return one(entry, sum(block_indices(entry.path)))
        layers = [one(entry, layer) for layer in range(math.prod(entry.stack))]
        return {n: np.stack([layer[n] for layer in layers]) for n in entry.adapter.statistics}

    return {entry.path: stacked(entry) for entry in plan if entry.adapter.statistics}


def fresh(plan: flora.Plan, params: Any, seed: int = 0) -> Any:
    """``flora.init`` with statistics for the methods that start from their inputs."""
    stats = make_stats(plan)
    return jax.jit(lambda p: flora.init(plan, jax.random.key(seed), p, stats=stats))(params)


def random_like(tree: Any, seed: int = 11) -> Any:
    """Trained adapters: every array moved by noise, so that no branch is zero."""
    draw = np.random.default_rng(seed).standard_normal

    def moved(leaf: jax.Array) -> jax.Array:
        noise = 0.3 * draw(leaf.shape, np.float32)
        return jnp.asarray((np.asarray(leaf) + noise).astype(leaf.dtype))

    return jax.tree.map(moved, tree)


def perturbed(plan: flora.Plan, adapters: Any, seed: int = 11) -> Any:
    train, frozen = flora.partition(adapters, plan)
    return flora.combine(random_like(train, seed), frozen)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on a kind of layer, at its start and after training."""

    layer: Layer
    params: Any
    x: jax.Array
    plan: flora.Plan
    start: Any
    moved: Any


@functools.cache
def case(name: str, kind: str) -> Case:
    """The case that several contracts look at, made once."""
    return case_of(layer_of(name, kind), ADAPTERS[name][0])


def case_of(layer: Layer, adapter: Any) -> Case:
    params = base_params(layer)
    plan = make_plan(layer, adapter, params)
    start = fresh(plan, params)
    return Case(layer, params, layer.x(), plan, start, perturbed(plan, start))


@functools.cache
def other(kind: str, stack: bool = False) -> Case:
    """A LoRA on the layer, to be another adapter beside a case's own."""
    layer = layer_of(sorted(NEEDS_STACK)[0], kind) if stack else LAYERS[kind]
    return case_of(layer, flora.LoRA(rank=2))


def _bottleneck(arrays: Any, pool: Any, y: jax.Array) -> jax.Array:
    z = jax.nn.silu(y @ arrays["down"] + arrays["down_bias"])
    return y + z @ arrays["up"] + arrays["up_bias"]


def _compacter(arrays: Any, pool: Any, y: jax.Array) -> jax.Array:
    def product(which: str) -> jax.Array:
        a = pool["a"] if pool else arrays[f"a_{which}"]
        b = arrays.get(f"{which}_b")
        b = arrays[f"{which}_s"] @ arrays[f"{which}_t"] if b is None else b
        return sum(jnp.kron(a[i], b[i]) for i in range(2))

    z = jax.nn.gelu(y @ product("down") + arrays["down_bias"], approximate=True)
    return y + z @ product("up") + arrays["up_bias"]


# What methods that do not merge make of a layer's plain output [..., out].
FORMULAS = {"Bottleneck": _bottleneck, "Compacter": _compacter, "Compacter-phm": _compacter}


def merges(name: str) -> bool:
    """Whether the case's method folds into the weight."""
    return method_of(ADAPTERS[name][0]).mergeable


def expected(
    name: str, layer: Layer, params: Any, adapters: Any, plan: flora.Plan, x: jax.Array
) -> tuple[Any, jax.Array]:
    """``(merged parameters, output)`` by other means: the merged weight or the written formula.

    The merged parameters are those of the first row, and the base of methods that do not merge.
    """
    if merges(name):
        parts = list(merged_rows(params, adapters, plan, x))
        y = jnp.concatenate([run(layer, merged, x[rows]) for rows, merged in parts])
        return parts[0][1], y
    arrays = adapters[layer.name]
    pool = next((adapters[pool.path] for pool in plan.pools), None)
    y = run(layer, params, x)
    if layer.spec.batch_axes:
        formula = lambda a, y: FORMULAS[name](a, pool, y)
        return params, jax.vmap(formula)(arrays, y)
    lead = y.shape[: y.ndim - (1 if layer.spec.kind.startswith("conv") else layer.n_out)]
    return params, FORMULAS[name](arrays, pool, y.reshape(*lead, -1)).reshape(y.shape)


def run(layer: Layer, tree: Any, x: jax.Array) -> jax.Array:
    y = layer.call(x, tree[layer.name])
    return y + tree["bias"] if layer.bias else y
