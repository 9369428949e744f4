"""Models with another attention: conversion, distillation, adapters, generation, files, NNX."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import attention, io, models
from flora_jax.attention import Distil, Hedgehog, LinearAttention, LoLCATs, Softmax
from flora_jax.core.errors import ConfigError, RuleError, StructureError
from flora_jax.core.paths import flatten, map_with_path
from flora_jax.evaluation import generate
from flora_jax.models import Bert, BertConfig, Llama, LlamaConfig, ViT, ViTConfig
from flora_jax.training.losses import Distillation

MAPS = ["layers/self_attn/attention/k_map", "layers/self_attn/attention/q_map"]


def random_params(model, seed=0):
    """Parameters from numpy: compiling the real initialisers takes seconds."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = 0.2 * rng.standard_normal(shape.shape) + path.endswith("scale")
        return jnp.asarray(value, shape.dtype)

    return map_with_path(leaf, models.abstract(model))


@pytest.fixture(scope="module")
def source():
    model = Llama(LlamaConfig.tiny())
    return model, random_params(model)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (2, 12), 0, 256)


def test_copies_what_fits_and_makes_what_is_new(source):
    model, params = source
    new, converted, report = flora.convert_attention(params, model, to=Hedgehog())
    assert list(report.new) == MAPS and not report.dropped and not report.renamed
    old, flat = flatten(params), flatten(converted)
    assert set(report.copied) == set(old) == set(flat) - set(MAPS)
    assert all(flat[path] is old[path] for path in old)
    assert flat[MAPS[0]].shape == (2, 4, 16, 16)
    np.testing.assert_array_equal(flat[MAPS[0]][1, 2], np.eye(16))
    # And back: what the variant had of its own is dropped, the rest is the source.
    again, back, report = flora.convert_attention(converted, new, to=Softmax())
    assert list(report.dropped) == MAPS and again == model
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)))


def test_rules_rename_and_drop(source):
    model, params = source
    rules = {"layers/self_attn/(o)_proj/kernel": None}
    _, out, report = flora.convert_attention(params, model, rules, to=Softmax())
    assert report.new == report.dropped == ("layers/self_attn/o_proj/kernel",)
    assert not np.allclose(
        out["layers"]["self_attn"]["o_proj"]["kernel"],
        params["layers"]["self_attn"]["o_proj"]["kernel"],
    )
    rules = {
        r"layers/self_attn/k_proj/kernel": r"layers/self_attn/v_proj/kernel",
        r"layers/self_attn/v_proj/kernel": r"layers/self_attn/k_proj/kernel",
    }
    _, out, report = flora.convert_attention(params, model, rules, to=Softmax())
    assert len(report.renamed) == 2 and not report.new
    assert out["layers"]["self_attn"]["k_proj"]["kernel"] is (
        params["layers"]["self_attn"]["v_proj"]["kernel"]
    )
    with pytest.raises(RuleError):
        flora.convert_attention(params, model, {"nothing": None}, to=Softmax())
    with pytest.raises(StructureError, match="both become"):
        rules = {"layers/self_attn/k_proj/kernel": "norm/scale"}
        flora.convert_attention(params, model, rules, to=Softmax())
    with pytest.raises(StructureError, match="q_proj/kernel .* not there"):
        rules = {"layers/self_attn/q_proj/kernel": "elsewhere"}
        flora.convert_attention(params, model, rules, to=Softmax())


def test_grafting_is_arithmetic_on_shared_leaves():
    one = lambda x: jnp.full((2,), x)
    base = {"a": one(1.0), "b": one(2.0), "c": one(5.0)}
    pretrained, converted = {"a": one(0.5), "c": jnp.ones(3)}, {"a": one(0.75), "c": jnp.ones(3)}
    out = flora.graft(base, converted | {"new": one(9.0)}, pretrained, 2.0)
    assert jax.tree.map(lambda x: float(x[0]), out) == {"a": 1.5, "b": 2.0, "c": 5.0, "new": 9.0}


@pytest.mark.parametrize(
    "variant",
    [LinearAttention(chunk=4), Hedgehog(chunk=4), LoLCATs(window=3, feature_dim=8, chunk=4)],
    ids=lambda v: type(v).__name__,
)
def test_decoding_equals_teacher_forcing_with_adapters(source, tokens, variant):
    """The whole model, LoRA bound, scanned: chunked prefill with padding, then token by token."""
    model, params, _ = flora.convert_attention(source[1], source[0], to=variant)
    plan = flora.plan(params, {"layers/self_attn/(q|k|v|o)_proj/kernel": flora.LoRA(rank=2)})
    adapters = jax.tree.map(lambda a: a + 0.1, flora.init(plan, jax.random.key(1), params))
    bound = flora.bind(params, adapters, plan)
    run = jax.jit(lambda b, t, **k: model.apply({"params": b}, t, **k))
    full, none = run(bound, tokens)
    assert none is None
    plain, _ = run(params, tokens)
    assert np.abs(full - plain).max() > 1e-2, "the adapters do nothing"
    cache = model.init_cache(2, 16)
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert bytes_ == sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(2, 2**16)))
    places = jnp.arange(8)[None].repeat(2, 0)
    lengths = jnp.asarray([[8], [5]])
    out, cache = run(bound, tokens[:, :8], positions=places, cache=cache, valid=places < lengths)
    np.testing.assert_allclose(out[0, :8], full[0, :8], atol=3e-5)
    np.testing.assert_allclose(out[1, :5], full[1, :5], atol=3e-5)
    ends = lengths[:, 0]
    for _ in range(4):
        token = jnp.take_along_axis(tokens, ends[:, None], axis=1)
        out, cache = run(bound, token, positions=ends[:, None], cache=cache)
        np.testing.assert_allclose(out[jnp.arange(2), 0], full[jnp.arange(2), ends], atol=3e-5)
        ends = ends + 1


def test_generates_as_teacher_forcing_says(source):
    """Prompts of different length in one batch: a state must not hold their padding."""
    to = LoLCATs(window=3, feature_dim=8)
    model, params, _ = flora.convert_attention(source[1], source[0], to=to)
    prompts = [[5, 9, 200], [7, 1, 4, 88, 31, 250, 17]]
    out = generate(model, params, prompts, max_new_tokens=5, eos_id=())
    logits = jax.jit(lambda t: model.apply({"params": params}, t)[0])
    for prompt, new in zip(prompts, out):
        row = jnp.asarray([prompt + new])
        forced = logits(row)[0, len(prompt) - 1 : -1].argmax(-1)
        assert forced.tolist() == new


def test_scan_equals_loop(source, tokens):
    model, params, _ = flora.convert_attention(source[1], source[0], to=Distil())
    (out, report), loop = model.apply({"params": params}, tokens), {"scan_layers": False}
    unrolled = Llama(dataclasses.replace(model.config, **loop))
    layers = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(2)}
    separate = {k: v for k, v in params.items() if k != "layers"} | layers
    same, again = unrolled.apply({"params": separate}, tokens)
    np.testing.assert_allclose(out, same, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), report, again)
    assert report["xent"].shape == (2, 2, 12)


def test_distillation_trains_the_maps_alone(source, tokens):
    """Stage one: the model gives what it gave, its weights get no gradient, the loss falls."""
    student = Hedgehog(feature_map="exp", bias=True)
    model, params, _ = flora.convert_attention(source[1], source[0], to=Distil(student=student))
    before = jax.jit(lambda p: source[0].apply({"params": p}, tokens)[0])(source[1])
    loss = Distillation(model=model)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens).at[:, -2:].set(0)}

    @jax.jit
    def everything(params):
        f = lambda p: loss(p, batch, None, True)
        (value, grads), out = jax.value_and_grad(lambda p: f(p)[0])(params), f(params)
        return value, grads, out[1], model.apply({"params": params}, tokens)[0]

    value, grads, weight, out = everything(params)
    np.testing.assert_allclose(out, before, atol=1e-5)
    assert weight == 20
    for path, g in flatten(grads).items():
        assert (np.abs(g).max() > 0) == ("/attention/" in path), path
    for _ in range(20):
        step = map_with_path(lambda path, p, g: p - 0.01 * g / 20, params, grads)
        params, last = step, value
        value, grads, _, _ = everything(params)
    assert value < last


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_report_to_the_distillation(kind, scan):
    """The means over real tokens, by hand from the layers' own reports; maps alone are trained."""
    if kind == "bert":
        model, inputs = Bert(BertConfig.tiny(scan_layers=scan)), ("tokens", "mask")
        batch = {"tokens": jnp.arange(12).reshape(2, 6), "mask": jnp.ones((2, 6)).at[1, 4:].set(0)}
    else:
        model, inputs = ViT(ViTConfig.tiny(scan_layers=scan)), ("image",)
        batch = {"image": jax.random.normal(jax.random.key(0), (2, 8, 8, 1))}
    batch["weight"] = jnp.ones(2)
    to = Distil(student=Hedgehog(feature_map="exp", bias=True), rows=4)
    model, params, _ = flora.convert_attention(random_params(model), model, to=to)
    loss = Distillation(model=model, inputs=inputs, mse=2.0)

    def both(params):
        total, *rest = loss(params, batch, None, True)
        return total, rest

    (total, (count, sums)), grads = jax.jit(jax.value_and_grad(both, has_aux=True))(params)
    arguments = [batch[name] for name in inputs]
    reports = model.apply({"params": params}, *arguments, output="reports")
    assert reports["xent"].shape == (2, 2, 6 if kind == "bert" else 17)
    real = batch.get("mask", jnp.ones(reports["xent"].shape[1:]))
    np.testing.assert_allclose(sums["xent"], (reports["xent"].mean(0) * real).sum(), rtol=1e-5)
    np.testing.assert_allclose(total, sums["xent"] + 2 * sums["mse"], rtol=1e-6)
    assert count == real.sum()
    for path, g in flatten(grads).items():
        own = path.endswith(("_map", "_bias")) and "/attention/" in path
        assert (np.abs(g).max() > 0) == own, path


def test_distillation_needs_a_student(source, tokens):
    with pytest.raises(ConfigError, match="attention=Distil"):
        Distillation(model=source[0])(source[1], {"tokens": tokens}, None, True)


@pytest.mark.parametrize("variant", [Hedgehog(feature_dim=4), Distil(student=LoLCATs(window=5))])
def test_files_keep_the_attention(tmp_path, source, variant):
    model, params, _ = flora.convert_attention(source[1], source[0], to=variant)
    io.save_hf(tmp_path, model, params)
    again, loaded = io.load_hf(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Bert(BertConfig.tiny()), jnp.ones((2, 7), jnp.int32)), (ViT(ViTConfig.tiny()), None)],
    ids=["bert", "vit"],
)
def test_encoders_take_a_variant(model, inputs):
    inputs = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)) if inputs is None else inputs
    params = random_params(model)
    to = Hedgehog(feature_map="exp")
    new, converted, report = flora.convert_attention(params, model, to=to)
    assert len(report.new) == 2 and all("/attention/" in path for path in report.new)
    run = lambda m, p: jax.jit(partial(m.apply, output="hidden"))({"params": p}, inputs)
    assert np.abs(run(new, converted) - run(model, params)).max() > 1e-4
    again = models.build(new.to_hf())
    assert again.config.attention == to


def test_as_plain_functions_in_nnx():
    """A variant needs no Linen: parameters and state are pytrees, attend is a function."""
    from flax import nnx

    sizes = attention.Sizes(heads=2, kv_heads=1, dim=4, width=8)
    variant = Hedgehog()

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.qkv = nnx.Linear(8, 16, rngs=rngs)
            self.own = nnx.data(
                {n: nnx.Param(a) for n, a in variant.init(rngs(), sizes, jnp.float32).items()}
            )

        def __call__(self, x):
            y = self.qkv(x).reshape(*x.shape[:2], 4, 4)
            own = {n: p[...] for n, p in self.own.items()}
            return variant.attend(own, y[:, :, :2], y[:, :, 2:3], y[:, :, 3:])[0]

    layer = Layer(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    grads = nnx.grad(lambda m, x: (m(x) ** 2).sum())(layer, x)
    assert np.abs(grads["own"]["q_map"][...]).max() > 1e-6
    assert jax.tree.structure(nnx.state(layer, nnx.Param)) == jax.tree.structure(grads)
