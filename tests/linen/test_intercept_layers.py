"""Every flax.linen layer with a kernel: intercepted lazy output == the plain model, merged."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.core.errors import FloraError, LazyError, PlanError, StructureError
from flora_jax.core.leaf import WeightLeaf
from flora_jax.linen import intercept, specs

KEY = jax.random.key(0)
SEQ = (2, 5, 6)
IMAGE = (2, 7, 6, 4)

LAYERS = {
    "dense": (nn.Dense(3), SEQ),
    "dense_no_bias": (nn.Dense(3, use_bias=False), SEQ),
    "dense_1d_input": (nn.Dense(3), (6,)),
    "general": (nn.DenseGeneral((2, 3)), SEQ),
    "general_two_axes": (nn.DenseGeneral(4, axis=(-2, -1)), (2, 3, 2, 5)),
    "general_inner_axes": (nn.DenseGeneral((2, 3), axis=(-1, 1)), (2, 3, 4, 5)),
    "general_batch": (nn.DenseGeneral(3, batch_dims=(0,)), (2, 5, 4)),
    "general_two_batch": (
        nn.DenseGeneral((3, 2), axis=(3,), batch_dims=(0, 1)),
        (2, 3, 5, 4),
    ),
    "einsum": (nn.Einsum((6, 2, 3), "btd,dnh->btnh"), SEQ),
    "einsum_dots": (nn.Einsum((5, 6, 3), "...td,tdh->...h"), SEQ),
    "einsum_batch": (nn.Einsum((5, 6, 3), "btd,tdh->bth"), SEQ),
    "einsum_moved": (nn.Einsum((3, 6), "btd,hd->hbt"), SEQ),
    "conv1d": (nn.Conv(3, 3), SEQ),
    "conv1d_causal": (nn.Conv(3, (3,), padding="CAUSAL", kernel_dilation=2), SEQ),
    "conv2d": (nn.Conv(3, (3, 2)), IMAGE),
    "conv2d_strides": (nn.Conv(3, (3, 3), strides=(2, 1), padding="VALID"), IMAGE),
    "conv2d_pads": (nn.Conv(3, (3, 2), padding=((1, 2), 1)), IMAGE),
    "conv2d_int_pad": (nn.Conv(3, (3, 2), padding=1, kernel_dilation=(2, 1)), IMAGE),
    "conv2d_input_dilation": (nn.Conv(3, (3, 2), padding=1, input_dilation=2), IMAGE),
    "conv2d_circular": (nn.Conv(3, (3, 4), padding="CIRCULAR", strides=2), IMAGE),
    "conv2d_reflect": (nn.Conv(3, (4, 3), padding="REFLECT", use_bias=False), IMAGE),
    "conv2d_groups": (nn.Conv(6, (3, 2), feature_group_count=2), IMAGE),
    "conv2d_no_batch": (nn.Conv(3, (3, 2)), IMAGE[1:]),
    "conv2d_two_batches": (nn.Conv(3, (3, 2)), (2, 3, 5, 4, 4)),
    "conv3d": (nn.Conv(3, (2, 3, 2)), (1, 3, 4, 3, 4)),
    "transpose1d": (nn.ConvTranspose(3, 3, strides=(2,)), SEQ),
    "transpose2d": (nn.ConvTranspose(3, (3, 2), strides=(2, 3)), IMAGE),
    "transpose2d_valid": (
        nn.ConvTranspose(3, (3, 2), padding="VALID", kernel_dilation=(1, 2)),
        IMAGE,
    ),
    "transpose2d_pads": (nn.ConvTranspose(3, (3, 2), padding=((2, 1), (1, 1))), IMAGE),
    "transpose2d_circular": (
        nn.ConvTranspose(3, (6, 5), strides=(2, 2), padding="CIRCULAR"),
        IMAGE,
    ),
    "transpose2d_circular_odd": (
        nn.ConvTranspose(3, (3, 4), strides=(3, 2), padding="CIRCULAR"),
        IMAGE[1:],
    ),
}
ADAPTERS = {
    "lora": flora.LoRA(rank=1, alpha=2.0),
    "flora": flora.FLoRA(ranks=1, window_rank=2, scale=1.5),
}


def filled(tree, seed=7, scale=0.5):
    """Numpy normals in the shapes of a tree (no compilation); all arrays away from zero."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    return jax.tree.map(draw, tree)


def setup(model, x, adapter, rule=".*(kernel|embedding)"):
    params = filled(jax.eval_shape(model.init, KEY, x)["params"])
    plan = flora.plan(params, {rule: adapter}, specs=specs(model, x))
    shapes = jax.eval_shape(lambda: flora.init(plan, KEY, params))
    return params, plan, filled(shapes, seed=8)


def check(model, x, params, plan, adapters, tol=1e-5, **apply):
    """Lazy == merged, and gradients flow into the adapters as they would through the merge."""

    def lazy(a):
        with intercept():
            return model.apply({"params": flora.bind(params, a, plan)}, x, **apply)

    def merged(a):
        full = flora.materialize(flora.bind(params, a, plan))
        return model.apply({"params": full}, x, **apply)

    def both(f):
        loss = lambda a: (jnp.sum(jnp.sin(y := f(a))), y)
        return jax.value_and_grad(loss, has_aux=True)(adapters)

    plain = lambda: model.apply({"params": params}, x, **apply)
    run = jax.jit(lambda: (both(lazy), both(merged), plain()))
    lazily, densely, plain = run()
    ((_, y), got), ((_, want), expected) = lazily, densely
    assert y.shape == want.shape and y.dtype == want.dtype
    np.testing.assert_allclose(y, want, rtol=tol, atol=tol)
    assert float(jnp.max(jnp.abs(want - plain))) > 1e-3
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert bool(jnp.all(jnp.isfinite(g)))
        np.testing.assert_allclose(g, e, rtol=20 * tol, atol=20 * tol)
    return y


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, adapter):
    model, shape = LAYERS[name]
    x = filled(jnp.zeros(shape), seed=2, scale=1.0)
    check(model, x, *setup(model, x, ADAPTERS[adapter]))


@pytest.mark.parametrize("name", LAYERS)
def test_plain_kernels_run_flax(name):
    model, shape = LAYERS[name]
    x = filled(jnp.zeros(shape), seed=2, scale=1.0)
    params = filled(jax.eval_shape(model.init, KEY, x)["params"])
    plain = lambda: model.apply({"params": params}, x)

    def intercepted():
        with intercept():
            return plain()

    assert str(jax.make_jaxpr(intercepted)()) == str(jax.make_jaxpr(plain)())


class Tied(nn.Module):
    rows: int = 9

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(self.rows, 6)
        return table.attend(nn.tanh(table(ids)))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("rows", [1, 9])
def test_embed_and_attend(adapter, rows):
    ids = jnp.array([[0, 1, 2], [-1, 4, 4]])
    model = Tied(rows)
    check(model, ids, *setup(model, ids, ADAPTERS[adapter]))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_attention(adapter):
    x = jax.random.normal(KEY, SEQ)
    params, plan, adapters = setup(Attention(), x, ADAPTERS[adapter])
    assert [e.path.split("/")[1] for e in plan] == ["key", "out", "query", "value"]
    assert plan["MultiHeadDotProductAttention_0/out/kernel"].spec.in_axes == (0, 1)
    check(Attention(), x, params, plan, adapters)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(5))(x)


def test_recurrent_cell_under_its_own_scan():
    x = jax.random.normal(KEY, SEQ)
    check(Cell(), x, *setup(Cell(), x, ADAPTERS["lora"]))


DTYPES = [(None, "float32"), ("bfloat16", "float32"), (None, "bfloat16"), ("float32", "bfloat16")]


@pytest.mark.parametrize("dtype, x_dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_output_dtype_is_the_layers(dtype, x_dtype, param_dtype):
    x = jax.random.normal(KEY, (2, 7, 6, 4)).astype(x_dtype)
    ids = jnp.array([1, 2])
    kw = {"dtype": dtype, "param_dtype": param_dtype}
    rows = [
        (nn.Dense(3, **kw), x),
        (nn.DenseGeneral((3, 2), axis=(-2, -1), **kw), x),
        (nn.Einsum((4, 3), "...d,dh->...h", preferred_element_type="float32", **kw), x),
        (nn.Conv(3, (2, 2), **kw), x),
        (nn.ConvTranspose(3, (2, 2), **kw), x),
        (nn.Embed(5, 4, **kw), ids),
        (nn.Dense(3, **kw), jnp.ones((2, 4), jnp.int32)),
    ]
    narrow = "bfloat16" in (dtype, x_dtype, param_dtype)
    for model, value in rows:
        params, plan, adapters = setup(model, value, flora.LoRA(rank=1))
        bound = flora.bind(params, adapters, plan)

        def both(bound=bound, model=model, value=value):
            with intercept():
                lazy = model.apply({"params": bound}, value)
            return lazy, model.apply({"params": flora.materialize(bound)}, value)

        got, want = jax.eval_shape(both)
        assert (got.dtype, got.shape) == (want.dtype, want.shape), type(model)
        if (dtype, x_dtype) == DTYPES[1] and param_dtype == "float32":
            got, want = (np.asarray(a, "float32") for a in jax.jit(both)())
            gap = np.max(np.abs(got - want))
            assert gap <= (0.04 if narrow else 1e-5) * np.max(np.abs(want)), type(model)


def test_precision_reaches_the_product():
    model, x = nn.Dense(3, precision="highest"), jnp.ones((2, 4))
    params, plan, adapters = setup(model, x, flora.LoRA(rank=1))

    def f(a):
        with intercept():
            return model.apply({"params": flora.bind(params, a, plan)}, x)

    assert "HIGHEST" in str(jax.make_jaxpr(f)(adapters))


def test_custom_promote_dtype_is_honoured():
    def to_half(*arrays, dtype=None, inexact=True):
        return [None if a is None else jnp.asarray(a, jnp.float16) for a in arrays]

    model, x = nn.Dense(3, promote_dtype=to_half), jnp.ones((2, 4))
    params, plan, adapters = setup(model, x, flora.LoRA(rank=1))
    with intercept():
        y = model.apply({"params": flora.bind(params, adapters, plan)}, x)
    assert y.dtype == jnp.float16

    def mixed(x, kernel, bias, dtype=None):
        return x, kernel.astype(jnp.float16), bias

    model = nn.Dense(3, promote_dtype=mixed)
    with intercept(), pytest.raises(LazyError, match="^kernel: promote_dtype gives a float32"):
        model.apply({"params": flora.bind(params, adapters, plan)}, x)


def bound_for(model, x, spec=None):
    params = filled(jax.eval_shape(model.init, KEY, x)["params"])
    name = "embedding" if "embedding" in params else "kernel"
    given = {name: spec} if spec is not None else {}
    plan = flora.plan(params, {name: flora.LoRA(rank=1)}, specs=given)
    adapters = filled(jax.eval_shape(lambda: flora.init(plan, KEY, params)))
    return flora.bind(params, adapters, plan)


IMG = jnp.ones((1, 5, 5, 4))
REFUSED = {
    "dot_general": (nn.Dense(3, dot_general=jax.lax.dot_general), None),
    "dot_general_cls": (nn.Dense(3, dot_general_cls=lambda: jax.lax.dot_general), None),
    "general dot_general": (
        nn.DenseGeneral((3,), dot_general=jax.lax.dot_general),
        None,
    ),
    "conv_general_dilated": (
        nn.Conv(3, (2, 2), conv_general_dilated=jax.lax.conv_general_dilated),
        None,
    ),
    "mask": (nn.Conv(3, (2, 2), mask=jnp.ones((2, 2, 4, 3))), None),
    "transposed mask": (nn.ConvTranspose(3, (2, 2), mask=jnp.ones((2, 2, 4, 3))), None),
    "transpose_kernel": (nn.ConvTranspose(3, (2, 2), transpose_kernel=True), None),
    "ConvLocal": (nn.ConvLocal(3, (2, 2)), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hooks_and_masks_are_refused(name):
    model, spec = REFUSED[name]
    bound = bound_for(model, IMG, spec)
    with intercept(), pytest.raises(FloraError, match=rf"^kernel: .*{name.split()[-1]}"):
        model.apply({"params": bound}, IMG)


def test_unsupported_kernels_cannot_be_planned_with_specs():
    for model in (nn.ConvLocal(3, (2, 2)), nn.ConvTranspose(3, (2, 2), transpose_kernel=True)):
        params = jax.eval_shape(model.init, KEY, IMG)["params"]
        with pytest.raises(PlanError, match="this one is other"):
            flora.plan(params, {"kernel": flora.LoRA(rank=1)}, specs=specs(model, IMG))


def test_wrong_input_and_wrong_spec_name_the_path():
    model = nn.Dense(3)
    bound = bound_for(model, jnp.ones((2, 4)))
    with intercept(), pytest.raises(StructureError, match=r"^kernel: .*\(4, 3\).*\(5, 3\)"):
        model.apply({"params": bound}, jnp.ones((2, 5)))
    model = nn.DenseGeneral((3, 2), axis=(-2, -1))
    bound = bound_for(model, IMG, flora.KernelSpec.conv(2))
    with intercept(), pytest.raises(PlanError, match="^kernel: .*pass specs="):
        model.apply({"params": bound}, IMG)


LOUD = {
    "dense": (nn.Dense(3), IMG, None),
    "general": (nn.DenseGeneral((3,)), IMG, None),
    "einsum": (nn.Einsum((4, 3), "...d,dh->...h"), IMG, None),
    "conv": (nn.Conv(3, (2, 2)), IMG, None),
    "transpose": (nn.ConvTranspose(3, (2, 2)), IMG, None),
    "embed": (nn.Embed(5, 4), jnp.array([1, 2]), None),
}


@pytest.mark.parametrize("name", LOUD)
def test_without_intercept_every_layer_says_what_to_do(name):
    model, x, spec = LOUD[name]
    bound = bound_for(model, x, spec)
    with pytest.raises(TypeError, match=re.escape("flora_jax.linen.intercept()")):
        model.apply({"params": bound}, x)
    with pytest.raises(TypeError, match=re.escape("flora_jax.linen.intercept()")):
        jax.jit(model.apply)({"params": bound}, x)


class Custom(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3))
        uses = {
            "matmul": lambda: x @ kernel,
            "einsum": lambda: jnp.einsum("...d,dh->...h", x, kernel),
            "transpose": lambda: jnp.dot(x, kernel.T.T),
            "astype": lambda: x @ kernel.astype(x.dtype),
            "index": lambda: x @ kernel[...],
            "scaled": lambda: x @ (2.0 * kernel),
        }
        return uses[self.how]()


@pytest.mark.parametrize("how", ["matmul", "einsum", "transpose", "astype", "index", "scaled"])
def test_unknown_module_is_loud_inside_intercept(how):
    bound = bound_for(Custom(how), jnp.ones((2, 4)))
    with intercept(), pytest.raises((TypeError, AttributeError), match="Adapted"):
        Custom(how).apply({"params": bound}, jnp.ones((2, 4)))


class Doubled(nn.Dense):
    """A user's subclass that wraps Dense's own call."""

    @nn.compact
    def __call__(self, x):
        return 2.0 * super().__call__(x)


def test_subclass_runs_its_own_code():
    x = jax.random.normal(KEY, (2, 4))
    check(Doubled(3), x, *setup(Doubled(3), x, flora.LoRA(rank=1)))


def test_leaf_stays_a_leaf():
    bound = bound_for(nn.Dense(3), jnp.ones((2, 4)))
    assert isinstance(bound["kernel"], WeightLeaf)
    assert not hasattr(bound["kernel"], "astype")
