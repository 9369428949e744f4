"""Foreign NNX models: adapted lazy output == the plain model with merged parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora_jax as flora
from flora_jax import nnx as fnnx
from flora_jax.core.errors import LazyError, PlanError, StructureError

RNGS = nnx.Rngs(0)
SEQ = (2, 5, 6)
IMAGE = (2, 7, 6, 4)

LAYERS = {
    "linear": (lambda: nnx.Linear(6, 3, rngs=RNGS), SEQ),
    "linear_no_bias": (lambda: nnx.Linear(6, 3, use_bias=False, rngs=RNGS), SEQ),
    "general": (lambda: nnx.LinearGeneral((5, 6), (2, 3), axis=(-2, -1), rngs=RNGS), SEQ),
    "general_batch": (lambda: nnx.LinearGeneral(6, 3, batch_axis={0: 2}, rngs=RNGS), SEQ),
    "einsum": (lambda: nnx.Einsum("btd,dnh->btnh", (6, 2, 3), (2, 3), rngs=RNGS), SEQ),
    "einsum_batch": (lambda: nnx.Einsum("btd,tdh->bth", (5, 6, 3), rngs=RNGS), SEQ),
    "conv1d": (lambda: nnx.Conv(6, 3, 3, padding="CAUSAL", rngs=RNGS), SEQ),
    "conv2d": (lambda: nnx.Conv(4, 3, (3, 2), strides=(2, 1), rngs=RNGS), IMAGE),
    "conv2d_groups": (
        lambda: nnx.Conv(4, 6, (3, 2), feature_group_count=2, padding="CIRCULAR", rngs=RNGS),
        IMAGE,
    ),
    "conv3d": (lambda: nnx.Conv(2, 3, (2, 3, 2), use_bias=False, rngs=RNGS), (1, 3, 4, 3, 2)),
    "transpose": (lambda: nnx.ConvTranspose(4, 3, (3, 2), strides=(2, 3), rngs=RNGS), IMAGE),
    "transpose_circular": (
        lambda: nnx.ConvTranspose(4, 3, (3, 4), strides=2, padding="CIRCULAR", rngs=RNGS),
        IMAGE,
    ),
    "attention": (
        lambda: nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=RNGS),
        SEQ,
    ),
}


@functools.cache
def layer(name):
    return LAYERS[name][0]()


ADAPTERS = {
    "lora": flora.LoRA(rank=1, alpha=2.0),
    "flora": flora.FLoRA(ranks=1, window_rank=2, scale=1.5),
}


def filled(tree, seed=7, scale=0.4):
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(draw, tree)


def setup(model, rules, **kw):
    params = fnnx.params(model)
    plan = flora.plan(params, rules, specs=fnnx.specs(model), **kw)
    return params, plan, filled(jax.eval_shape(lambda: flora.init(plan, jax.random.key(0), params)))


def check(original, x, rules):
    """The adapted model's values and adapter gradients are those of the merged original."""
    model = fnnx.adapt(original)
    params, plan, adapters = setup(model, rules)
    jax.tree.map(np.testing.assert_array_equal, params, fnnx.params(original))

    def both(f):
        loss = lambda a: (jnp.sum(jnp.sin(y := f(flora.bind(params, a, plan)))), y)
        return jax.value_and_grad(loss, has_aux=True)(adapters)

    lazy = lambda bound: fnnx.apply(model, bound, x)
    merged = lambda bound: fnnx.apply(original, flora.materialize(bound), x)
    run = jax.jit(lambda: (both(lazy), both(merged), fnnx.apply(original, params, x)))
    lazily, densely, plain = run()
    ((_, y), got), ((_, want), expected) = lazily, densely
    assert y.dtype == want.dtype
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(want - plain))) > 1e-4
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert bool(jnp.all(jnp.isfinite(g)))
        np.testing.assert_allclose(g, e, rtol=1e-3, atol=2e-4 * max(1.0, float(jnp.abs(e).max())))
    return plan


@pytest.mark.parametrize(
    "name, adapter",
    [(name, "lora") for name in LAYERS]
    + [(name, "flora") for name in ("general", "einsum_batch", "conv2d_groups", "transpose")],
)
def test_layer(name, adapter):
    check(layer(name), filled(jnp.zeros(LAYERS[name][1]), 2, 1.0), {".*kernel": ADAPTERS[adapter]})


@pytest.mark.parametrize("name", LAYERS)
def test_plain_kernels_run_flax(name):
    x, original = filled(jnp.zeros(LAYERS[name][1]), 2, 1.0), layer(name)
    model, params = fnnx.adapt(original), fnnx.params(original)
    run = lambda m: str(jax.make_jaxpr(lambda p: fnnx.apply(m, p, x))(params))
    assert run(model) == run(original)


class Tied(nnx.Module):
    def __init__(self, rows):
        self.table = nnx.Embed(rows, 6, rngs=RNGS)

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.table(ids)))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("rows", [1, 9])
def test_embed_and_attend(rows, adapter):
    ids = jnp.array([[0, 1, 2], [-1, 4, 4]])
    check(Tied(rows), ids, {"table/embedding": ADAPTERS[adapter]})


class Doubled(nnx.Linear):
    """A user's subclass around Linear's own call."""

    def __call__(self, x):
        return 2.0 * super().__call__(x)


def test_user_subclass_keeps_its_call():
    model = fnnx.adapt(Doubled(6, 3, rngs=RNGS))
    assert isinstance(model, Doubled) and type(model).__name__ == "Doubled"
    assert type(fnnx.adapt(model)) is type(model)
    check(Doubled(6, 3, rngs=RNGS), jnp.ones((2, 6)), {"kernel": ADAPTERS["lora"]})


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, width, rngs=rngs)
        )
        self.dropout = nnx.Dropout(0.2, deterministic=True, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attn(self.norm(x), mask=mask)
        return x + self.dropout(self.mlp(x))


class Transformer(nnx.Module):
    """Blocks in a list, or stacked by vmap and run by scan (rematerialised)."""

    def __init__(self, rngs, *, stacked, depth=2, width=8):
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.stacked = stacked
        if stacked:
            make = nnx.split_rngs(splits=depth)(nnx.vmap(lambda r: Block(width, r)))
            self.layers = make(rngs)
        else:
            self.layers = nnx.List([Block(width, rngs) for _ in range(depth)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.stacked:
            step = nnx.scan(
                nnx.remat(lambda x, layer: layer(x)),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            x = step(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.embed.attend(x)


@functools.cache
def transformer(stacked):
    return nnx.jit(lambda: Transformer(nnx.Rngs(1), stacked=stacked))()


TOKENS = jax.random.randint(jax.random.key(3), (2, 6), 0, 11)
RULES = {
    r"layers/attn/(query|out)/kernel": flora.LoRA(rank=2),
    r"layers/mlp/.*kernel": flora.FLoRA(ranks=2, scale=1.0),
    "embed/embedding": flora.LoRA(rank=2),
}


@pytest.mark.parametrize("stacked", [False, True])
def test_transformer(stacked):
    plan = check(transformer(stacked), TOKENS, RULES)
    assert len(plan) == (5 if stacked else 9)
    kernel = "layers/attn/out/kernel" if stacked else "layers/1/attn/out/kernel"
    assert plan[kernel].spec == flora.KernelSpec.dense(2, 1, stack_ndim=int(stacked))


def test_nested_blocks_draw_their_own_adapters():
    """A list in a stack: each element its own keys, the same as in a list of lists."""
    fresh = {}
    for stacked in (True, False):
        params, plan, _ = setup(
            fnnx.adapt(transformer(stacked)), {".*/mlp/.*kernel": flora.LoRA(rank=2)}
        )
        fresh[stacked] = flora.init(plan, jax.random.key(0), params)
    for n in (0, 2):
        whole = fresh[True][f"layers/mlp/layers/{n}/kernel"]["a"]
        parts = [fresh[False][f"layers/{i}/mlp/layers/{n}/kernel"]["a"] for i in range(2)]
        np.testing.assert_array_equal(whole, jnp.stack(parts))
    first, third = (fresh[False][f"layers/0/mlp/layers/{n}/kernel"]["a"] for n in (0, 2))
    assert not bool(jnp.any(first == third[: first.shape[0]]))


def test_original_is_untouched_and_arrays_are_shared():
    original = transformer(False)
    model = fnnx.adapt(original)
    assert type(original.embed) is nnx.Embed and type(model.embed) is not nnx.Embed
    assert type(model.layers[0].norm) is nnx.LayerNorm
    ours, theirs = fnnx.params(model), fnnx.params(original)
    same = jax.tree.map(lambda a, b: a is b, ours, theirs)
    assert all(jax.tree.leaves(same))


def test_functional_keeps_other_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

        def head(self, x, scale):
            return scale * self.linear(x)

    model = fnnx.adapt(Net(nnx.Rngs(0)))
    f, params, rest = fnnx.functional(model)
    plan = flora.plan(params, {"linear/kernel": flora.LoRA(rank=1)})
    bound = flora.bind(params, flora.init(plan, jax.random.key(1), params), plan)
    x = filled(jnp.zeros((8, 4)), 3, 1.0)
    step = jax.jit(f)
    first, rest1 = step(bound, rest, x)
    second, rest2 = step(bound, rest1, x)
    assert bool(jnp.any(first != second))
    np.testing.assert_array_equal(step(bound, rest, x)[0], first)
    mean = lambda state: nnx.to_pure_dict(state)["norm"]["mean"]
    assert float(jnp.abs(mean(rest)).max()) == 0.0
    assert float(jnp.abs(mean(rest2)).max()) > float(jnp.abs(mean(rest1)).max()) > 0.0
    y, _ = jax.jit(f, static_argnames="method")(bound, rest, x, 2.0, method="head")
    np.testing.assert_allclose(y, 2.0 * model.linear(x), rtol=1e-5)
    y = fnnx.apply(model, bound, x, method=lambda m, x: m.linear(x))
    np.testing.assert_allclose(y, model.linear(x), rtol=1e-5)


def test_not_adapted_model_is_loud():
    for name, (_, shape) in LAYERS.items():
        model = layer(name)
        params, plan, adapters = setup(model, {".*kernel": flora.LoRA(rank=1)})
        bound = flora.bind(params, adapters, plan)
        with pytest.raises(TypeError, match=re.escape("flora_jax.nnx.adapt()")):
            fnnx.apply(model, bound, jnp.ones(shape))
    params, plan, adapters = setup(Tied(9), {"table/embedding": flora.LoRA(rank=1)})
    with pytest.raises(TypeError, match=re.escape("flora_jax.nnx.adapt()")):
        fnnx.apply(Tied(9), flora.bind(params, adapters, plan), jnp.array([1]))


def test_unknown_module_is_loud():
    class Custom(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(rngs.normal((4, 3)))
            self.out = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x, how):
            uses = {
                "value": lambda: x @ self.kernel[...],
                "matmul": lambda: x @ self.kernel,
                "einsum": lambda: jnp.einsum("bd,dh->bh", x, self.kernel),
                "astype": lambda: x @ self.kernel.astype(jnp.float32),
            }
            return self.out(uses[how]())

    model = fnnx.adapt(Custom(nnx.Rngs(0)))
    params, plan, adapters = setup(model, {"kernel": flora.LoRA(rank=1)})
    bound = flora.bind(params, adapters, plan)
    for how in ("value", "matmul", "einsum", "astype"):
        with pytest.raises((TypeError, AttributeError), match="Adapted"):
            fnnx.apply(model, bound, jnp.ones((2, 4)), how)


def refusing(make, x, match):
    model = fnnx.adapt(make)
    params, plan, adapters = setup(model, {"kernel": flora.LoRA(rank=1)})
    with pytest.raises(LazyError, match=match):
        fnnx.apply(model, flora.bind(params, adapters, plan), x)


def test_hooks_are_refused():
    dot = lambda *a, **k: jax.lax.dot_general(*a, **k)
    conv = lambda *a, **k: jax.lax.conv_general_dilated(*a, **k)
    x = jnp.ones((2, 5, 4))
    refusing(nnx.Linear(4, 3, dot_general=dot, rngs=RNGS), x, "dot_general")
    refusing(nnx.LinearGeneral(4, 3, dot_general_cls=lambda: dot, rngs=RNGS), x, "dot_general_cls")
    refusing(
        nnx.Einsum("btd,dh->bth", (4, 3), einsum_op=lambda *a, **k: 0, rngs=RNGS), x, "einsum_op"
    )
    refusing(nnx.Conv(4, 3, 2, conv_general_dilated=conv, rngs=RNGS), x, "conv_general_dilated")
    refusing(nnx.Conv(4, 3, 2, mask=jnp.ones((2, 4, 3)), rngs=RNGS), x, "mask")
    transposed = nnx.ConvTranspose(4, 3, 2, transpose_kernel=True, rngs=RNGS)
    with pytest.raises(PlanError, match="this one is other"):
        setup(transposed, {"kernel": flora.LoRA(rank=1)})


def test_bad_parameters_and_models():
    model = fnnx.adapt(nnx.Linear(4, 3, rngs=RNGS))
    params = fnnx.params(model)
    with pytest.raises(StructureError, match=r"missing \['bias'\], extra \['b'\]"):
        fnnx.apply(model, {"kernel": params["kernel"], "b": params["bias"]}, jnp.ones((2, 4)))
    with pytest.raises(StructureError, match="LayerNorm has no Flax layer"):
        fnnx.adapt(nnx.LayerNorm(3, rngs=RNGS))
    make = nnx.vmap(lambda r: nnx.Linear(4, 3, use_bias=False, rngs=r), out_axes=2)
    last = nnx.split_rngs(splits=2)(make)(nnx.Rngs(0))
    with pytest.raises(PlanError, match=r"kernel: stored shape \(4, 3, 2\).*first axis"):
        fnnx.specs(last)


def test_low_bit_base():
    model = fnnx.adapt(transformer(True))
    params, layout = fnnx.params(model), fnnx.specs(model)
    rules = {"layers/mlp/.*kernel|.*/out/kernel|.*embedding": flora.Format("int4", block=4)}
    small = flora.quantize(params, rules, specs=layout)
    plan = flora.plan(small, RULES, specs=layout)
    adapters = filled(jax.eval_shape(lambda: flora.init(plan, jax.random.key(0), params)))
    run = jax.jit(lambda bound: fnnx.apply(model, bound, TOKENS))
    dense = flora.materialize(flora.bind(flora.dequantize(small), adapters, plan))
    got, want = run(flora.bind(small, adapters, plan)), run(dense)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_training_end_to_end():
    original = transformer(True)
    model = fnnx.adapt(original)
    f, params, rest = fnnx.functional(model)
    layout = fnnx.specs(model)
    plan = flora.plan(params, {"layers/.*kernel": flora.LoRA(rank=2)}, specs=layout)
    adapters = flora.init(plan, jax.random.key(0), params)
    optimizer = optax.adam(3e-2)

    def loss(adapters):
        logits, _ = f(flora.bind(params, adapters, plan), rest, TOKENS)
        labels = TOKENS[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels).mean()

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state, values = optimizer.init(adapters), []
    for _ in range(20):
        adapters, state, value = step(adapters, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    bound = flora.bind(params, adapters, plan)
    tuned = fnnx.apply(model, bound, TOKENS)
    merged = fnnx.merge(original, flora.materialize(bound))
    np.testing.assert_allclose(tuned, merged(TOKENS), rtol=1e-4, atol=1e-5)
    assert type(merged) is Transformer
