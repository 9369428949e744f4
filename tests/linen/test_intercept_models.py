"""Foreign Linen models under scan, remat, vmap and jit; specs; training end to end."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as flora
from flora_jax.core.errors import PlanError
from flora_jax.linen import intercept, specs

KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(3), (2, 6), 0, 11)


class Block(nn.Module):
    """A pre-norm transformer block as Flax's examples write it."""

    train: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True, name="attn")(y, y, mask=mask)
        y = nn.Dense(16, name="up")(nn.LayerNorm()(x))
        y = nn.Dropout(0.1, deterministic=not self.train)(nn.gelu(y))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Transformer(nn.Module):
    """Embedding, scanned (and rematerialised) blocks, tied head."""

    stack: str = "scan"
    axis: int = 0
    depth: int = 3

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(tokens)
        if self.stack == "loop":
            for i in range(self.depth):
                x, _ = Block(name=f"layers_{i}")(x)
        else:
            block = nn.remat(Block, prevent_cse=False) if self.stack == "remat" else Block
            scanned = nn.scan(
                block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
            )
            x, _ = scanned(name="layers")(x, None)
        return embed.attend(nn.LayerNorm()(x))


def filled(tree, seed=7, scale=0.3):
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(draw, tree)


RULES = {
    r"layers/attn/(query|value|out)/kernel": flora.LoRA(rank=2),
    r"layers/(up|down)/kernel": flora.FLoRA(ranks=2, scale=1.0),
    "embed/embedding": flora.LoRA(rank=2),
}


def setup(model, x, rules):
    params = filled(jax.eval_shape(model.init, KEY, x)["params"])
    plan = flora.plan(params, rules, specs=specs(model, x))
    return params, plan, filled(jax.eval_shape(lambda: flora.init(plan, KEY, params)), seed=8)


def lazy_and_merged(model, x, params, plan, adapters):
    def lazy(a):
        with intercept():
            return model.apply({"params": flora.bind(params, a, plan)}, x)

    def merged(a):
        return model.apply({"params": flora.materialize(flora.bind(params, a, plan))}, x)

    def both(f):
        loss = lambda a: (jnp.sum(jnp.sin(y := f(a))), y)
        return jax.value_and_grad(loss, has_aux=True)(adapters)

    run = jax.jit(lambda: (both(lazy), both(merged)))
    return run()


@pytest.mark.parametrize("stack", ["scan", "remat", "loop"])
def test_transformer(stack):
    model = Transformer(stack)
    params, plan, adapters = setup(model, TOKENS, RULES)
    assert len(plan) == (16 if stack == "loop" else 6)
    ((_, y), got), ((_, want), expected) = lazy_and_merged(model, TOKENS, params, plan, adapters)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    for path in expected:
        for name in expected[path]:
            g, e = got[path][name], expected[path][name]
            np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(e))))
            assert bool(jnp.any(g != 0)), path


def test_specs_of_a_scanned_model():
    found = specs(Transformer(), jax.ShapeDtypeStruct((2, 6), "int32"))
    assert found["layers/attn/query/kernel"] == flora.KernelSpec.dense(1, 2, stack_ndim=1)
    assert found["layers/attn/out/kernel"] == flora.KernelSpec.dense(2, 1, stack_ndim=1)
    assert found["layers/up/kernel"] == flora.KernelSpec.dense(stack_ndim=1)
    assert found["embed/embedding"] == flora.KernelSpec.embedding()
    assert len(found) == 7
    unrolled = specs(Transformer("loop"), TOKENS)
    assert len(unrolled) == 19
    assert unrolled["layers_2/attn/out/kernel"] == flora.KernelSpec.dense(2, 1)


def test_specs_refuse_another_stack_axis():
    with pytest.raises(PlanError, match=r"layers/.*first axis"):
        specs(Transformer(axis=1), TOKENS)


class Both(nn.Module):
    """An indexed and an index-free name with one canonical path."""

    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((2, 2), name="layers")(x)
        return nn.DenseGeneral((4,), axis=(-2, -1), name="layers_0")(y)


def test_specs_match_one_path_each():
    x = jnp.ones((2, 4))
    params = jax.eval_shape(Both().init, KEY, x)["params"]
    plan = flora.plan(params, {".*kernel": flora.LoRA(rank=1)}, specs=specs(Both(), x))
    assert plan["layers/kernel"].spec == flora.KernelSpec.dense(1, 2)
    assert plan["layers_0/kernel"].spec == flora.KernelSpec.dense(2, 1)


def test_specs_take_static_arguments_methods_and_streams():
    class Net(nn.Module):
        @nn.compact
        def encode(self, x, train, *, heads):
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            x = nn.Dropout(0.5, deterministic=not train)(x + noise)
            return nn.DenseGeneral((heads, 2))(x)

    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    found = specs(Net(), x, True, heads=3, method="encode", rngs=("noise",))
    assert found == {"DenseGeneral_0/kernel": flora.KernelSpec.dense(1, 2)}


def test_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model", None))
    model, x = nn.DenseGeneral((2, 3), kernel_init=init, use_bias=False), jnp.ones((2, 4))
    boxed = filled(jax.eval_shape(model.init, KEY, x)["params"])
    for params in (boxed, nn.meta.unbox(boxed)):
        plan = flora.plan(params, {"kernel.*": flora.LoRA(rank=1)}, specs=specs(model, x))
        adapters = filled(jax.eval_shape(lambda: flora.init(plan, KEY, params)))  # noqa: B023
        bound = flora.bind(params, adapters, plan)
        with intercept():
            y = model.apply({"params": bound}, x)
        want = model.apply({"params": flora.materialize(bound)}, x)
        np.testing.assert_allclose(y, want, rtol=1e-5)


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense,
            in_axes=None,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return nn.remat(nn.Dense)(2)(jnp.tanh(dense(4)(x)))


def test_vmapped_and_rematted_layer_classes():
    x = filled(jnp.zeros((2, 5)))
    params, plan, adapters = setup(Ensemble(), x, {".*kernel": flora.LoRA(rank=1)})
    assert [e.spec.stack_ndim for e in plan] == [0, 1]
    ((_, y), got), ((_, want), expected) = lazy_and_merged(Ensemble(), x, params, plan, adapters)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)


def test_without_intercept_a_scanned_model_is_loud():
    params, plan, adapters = setup(Transformer(), TOKENS, RULES)
    bound = flora.bind(params, adapters, plan)
    with pytest.raises(TypeError, match="flora_jax.linen.intercept"):
        Transformer().apply({"params": bound}, TOKENS)
    only = flora.plan(params, {"embed/embedding": flora.LoRA(rank=1)})
    fresh = filled(jax.eval_shape(lambda: flora.init(only, KEY, params)))
    with pytest.raises(TypeError, match="flora_jax.linen.intercept"):
        Transformer().apply({"params": flora.bind(params, fresh, only)}, TOKENS)


def test_low_bit_base():
    """Packed leaves: no shape of theirs is the layer's, tables and stacks included."""
    model = Transformer()
    params = filled(jax.eval_shape(model.init, KEY, TOKENS)["params"])
    layout = specs(model, TOKENS)
    rules = {r".*(kernel|embedding)": flora.Format("int4", block=4)}
    small = flora.quantize(params, rules, specs=layout)
    plan = flora.plan(small, RULES, specs=layout)
    adapters = filled(jax.eval_shape(lambda: flora.init(plan, KEY, params)), seed=8)
    with intercept():
        y = jax.jit(model.apply)({"params": flora.bind(small, adapters, plan)}, TOKENS)
    dense = flora.bind(flora.dequantize(small), adapters, plan)
    want = jax.jit(model.apply)({"params": flora.materialize(dense)}, TOKENS)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_training_end_to_end():
    model = Transformer("remat")
    params = filled(jax.eval_shape(model.init, KEY, TOKENS)["params"])
    rules = {r"layers/.*kernel": flora.LoRA(rank=2), "embed/embedding": flora.LoRA(rank=4)}
    plan = flora.plan(params, rules, specs=specs(model, TOKENS))
    adapters = flora.init(plan, KEY, params)
    optimizer = optax.adam(3e-2)

    def loss(adapters):
        with intercept():
            logits = model.apply({"params": flora.bind(params, adapters, plan)}, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    plain = jax.jit(model.apply)({"params": params}, TOKENS)
    with intercept():
        start = jax.jit(model.apply)({"params": flora.bind(params, adapters, plan)}, TOKENS)
    np.testing.assert_allclose(start, plain, rtol=1e-6, atol=1e-6)
    state, values = optimizer.init(adapters), []
    for _ in range(20):
        adapters, state, value = step(adapters, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    bound = flora.bind(params, adapters, plan)
    with intercept():
        tuned = jax.jit(model.apply)({"params": bound}, TOKENS)
    merged = jax.jit(model.apply)({"params": flora.materialize(bound)}, TOKENS)
    np.testing.assert_allclose(tuned, merged, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(flora.materialize(bound)) == jax.tree.structure(params)
