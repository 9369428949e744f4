"""Ranks brought together, hot swap, and mixed batches of a tiny Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine_convert import r, trained

import flora_jax as flora
from flora_jax import models
from flora_jax.core.errors import ConfigError, PlanError, StructureError
from flora_jax.core.paths import map_with_path
from flora_jax.evaluation import generate
from flora_jax.models import Llama, LlamaConfig

Q, MLP, EMBED = r"layers/self_attn/q_proj/kernel", r"layers/mlp/.*/kernel", "embed_tokens/embedding"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 250, (4, 6)))


@pytest.fixture(scope="module")
def tiny():
    config = LlamaConfig.tiny(
        hidden_size=32, intermediate_size=48, eos_token_id=None, qkv_bias=True, remat="full"
    )
    model = Llama(config)
    rng = np.random.default_rng(0)
    leaf = lambda path, x: jnp.asarray(
        0.2 * rng.standard_normal(x.shape) + path.endswith("scale"), x.dtype
    )
    return model, map_with_path(leaf, models.abstract(model))


@pytest.fixture(scope="module")
def family(tiny):
    """Three LoRAs of different ranks, scales and weights, under one plan."""
    _, params = tiny
    rules = {
        "a": {Q: flora.LoRA(rank=2, alpha=8), MLP: flora.LoRA(rank=3)},
        "b": {Q: flora.LoRA(rank=4, rslora=True, use_bias=True)},
        "c": {Q: flora.LoRA(rank=1, alpha=0.5), EMBED: flora.LoRA(rank=2)},
    }
    made = {name: trained(params, own, seed) for seed, (name, own) in enumerate(rules.items())}
    plans = {name: plan for name, (plan, _) in made.items()}
    trees = {name: jax.tree.map(lambda a: 0.3 * a, tree) for name, (_, tree) in made.items()}
    return plans, trees, *flora.pad_rank(trees, plans)


def test_padding_changes_no_weight(tiny, family):
    _, params = tiny
    plans, trees, plan, padded = family
    assert plan[next(iter(plan)).path] and {e.adapter.rank for e in plan} == {2, 3, 4}
    for name in trees:
        one = flora.materialize(flora.bind(params, trees[name], plans[name]))
        two = flora.materialize(flora.bind(params, padded[name], plan))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


@pytest.mark.parametrize(
    "kinds",
    [
        (flora.DoRA(rank=1), flora.DoRA(rank=3, alpha=2)),
        (flora.PiSSA(rank=2, alpha=4), flora.PiSSA(rank=3, alpha=3)),
        (flora.LoRA(rank=2, alpha=6), flora.LoRA(rank=3, alpha=9)),
    ],
    ids=lambda kinds: type(kinds[0]).__name__,
)
def test_padding_of_the_family(kinds):
    params = {"kernel": r(8, 6)}
    made = {str(n): trained(params, {"kernel": a}, n) for n, a in enumerate(kinds)}
    plans, trees = ({n: m[i] for n, m in made.items()} for i in (0, 1))
    plan, padded = flora.pad_rank(trees, plans, rank=4)
    (entry,) = plan
    same = kinds[0].scale == kinds[1].scale
    assert entry.adapter.rank == 4 and entry.adapter.scale == (kinds[0].scale if same else 1.0)
    for name in trees:
        one = flora.materialize(flora.bind(params, trees[name], plans[name]))["kernel"]
        two = flora.materialize(flora.bind(params, padded[name], plan))["kernel"]
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_padding_refuses():
    params = {"up": {"kernel": r(8, 6)}, "down": {"kernel": r(6, 8)}}
    make = lambda adapter, rule=".*": trained(params, {rule: adapter})
    lora, dora = make(flora.LoRA(rank=2)), make(flora.DoRA(rank=2))

    def pad(*made, **kw):
        plans, trees = ({str(n): m[i] for n, m in enumerate(made)} for i in (0, 1))
        return flora.pad_rank(trees, plans, **kw)

    with pytest.raises(StructureError, match="down/kernel: LoRA and DoRA are two methods"):
        pad(lora, dora)
    with pytest.raises(PlanError, match="down/kernel: IA3 of '1' is not of the LoRA family"):
        pad(lora, make(flora.IA3()))
    with pytest.raises(PlanError, match="up/kernel: not every adapter has it, and a DoRA of zeros"):
        pad(dora, make(flora.DoRA(rank=2), "down/kernel"))
    with pytest.raises(PlanError, match="rank=1 is below the 2"):
        pad(lora, rank=1)


def loss_of(model, bound, tokens):
    logits, _ = model.apply({"params": bound}, tokens)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return -picked.sum(-1), logits


ROWS = ["a", None, "c", "a"]


def test_a_mixed_batch_is_each_row_under_its_adapter(tiny, family):
    """Logits and gradients under scan and remat; named trees and the bank give the same."""
    model, params = tiny
    _, _, plan, padded = family
    bank = flora.AdapterBank(plan, capacity=4)
    for name, tree in padded.items():
        bank.load(name, tree)

    @jax.jit
    def mixed(slots, rows):
        def total(slots):
            losses, logits = loss_of(model, flora.bind(params, slots, plan, rows=rows), TOKENS)
            return losses.sum(), logits

        return jax.value_and_grad(total, has_aux=True)(slots)

    @jax.jit
    def alone(tree):
        def total(tree):
            losses, logits = loss_of(model, flora.bind(params, tree, plan), TOKENS)
            mask = jnp.asarray([name in ("a",) for name in ROWS])
            return jnp.where(mask, losses, 0).sum(), logits

        return jax.value_and_grad(total, has_aux=True)(tree)

    (_, logits), grads = mixed(bank.arrays, bank.rows(ROWS))
    (_, named), named_grads = mixed(dict(padded), jnp.array([0, -1, 2, 0]))
    np.testing.assert_allclose(logits, named, atol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, padded["a"])
    for n, name in enumerate(ROWS):
        own = alone(padded[name] if name else zero)[0][1]
        np.testing.assert_allclose(logits[n], own[n], atol=2e-4, err_msg=str(name))
    _, expected = alone(padded["a"])
    bank.arrays = grads
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3)
    jax.tree.map(close, bank.get("a"), expected)
    jax.tree.map(close, named_grads["a"], expected)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(bank.get("b"))), "no row used b"
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-2


def test_swapping_adapters_rows_and_weights_compiles_nothing(tiny, family):
    model, params = tiny
    _, _, plan, padded = family
    bank = flora.AdapterBank(plan, capacity=2)
    bank.load("a", padded["a"])
    bank.load("b", padded["b"])
    forward = jax.jit(
        lambda slots, rows: model.apply(
            {"params": flora.bind(params, slots, plan, rows=rows)}, TOKENS
        )[0]
    )
    before = forward(bank.arrays, bank.rows(["a", "b", "a", None]))
    with pytest.raises(ConfigError, match="all 2 slots are taken: unload one of a, b"):
        bank.load("c", padded["c"])
    bank.unload("a")
    bank.load("c", padded["c"])
    after = forward(bank.arrays, bank.rows(["c", "b", "c", None]))
    assert forward._cache_size() == 1 and bank.names == ("b", "c")
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)
    np.testing.assert_allclose(before[3], after[3], atol=1e-6)
    assert np.abs(before[0] - after[0]).max() > 1e-2
    got = bank.get("c")
    jax.tree.map(np.testing.assert_array_equal, got, padded["c"])
    weighted = jax.jit(
        lambda trees, weights: model.apply(
            {"params": flora.bind(params, trees, plan, weights=weights)}, TOKENS
        )[0]
    )
    pair = {"x": padded["a"], "y": padded["b"]}
    one = weighted(pair, {"x": 1.0, "y": 0.0})
    two = weighted({"x": padded["c"], "y": padded["b"]}, {"x": 0.5, "y": -1.0})
    assert weighted._cache_size() == 1 and np.abs(one - two).max() > 1e-2


def test_rows_count_sorted_names_under_one_plan(tiny, family):
    """In and out of jit, which sorts the keys of its arguments."""
    _, params = tiny
    _, _, plan, padded = family
    kernel = lambda bound: bound["layers"]["self_attn"]["q_proj"]["kernel"]
    trees = {"b": padded["b"], "a": padded["a"]}
    bind = lambda trees: kernel(flora.bind(params, trees, plan, rows=jnp.zeros(4, int)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, bind(trees), jax.jit(bind)(trees))
    jax.tree.map(close, bind(trees), bind(dict(sorted(trees.items()))))


def test_a_mixed_batch_generates_what_each_adapter_does(tiny, family):
    model, params = tiny
    _, _, plan, padded = family
    bank = flora.AdapterBank(plan, capacity=3)
    for name in ("a", "c"):
        bank.load(name, padded[name])
    prompts = [[5, 9, 200], [7, 1, 4, 88], [42], [5, 9, 200]]
    bound = flora.bind(params, bank.arrays, plan, rows=bank.rows(["a", "c", None, "c"]))
    together = generate(model, bound, prompts, max_new_tokens=6)
    alone = lambda name: generate(
        model, flora.bind(params, padded[name], plan), prompts, max_new_tokens=6
    )
    a, c = alone("a"), alone("c")
    base = generate(model, params, prompts, max_new_tokens=6)
    assert together == [a[0], c[1], base[2], c[3]]
    assert len({tuple(a[0]), tuple(c[0]), tuple(base[0])}) > 1, "the adapters change nothing"


@pytest.mark.parametrize(
    "adapter",
    [flora.DoRA(rank=2), flora.VeRA(rank=3), flora.IA3(), flora.LoRA(rank=2, dropout=0.5)],
    ids=lambda a: type(a).__name__,
)
def test_the_bank_is_named_trees(adapter):
    """Seeded bases, biases and dropout: the same as bind with a dict of trees."""
    params = {"layers": {"kernel": r(3, 8, 8), "bias": r(3, 8)}}
    plan, one = trained(params, {"layers/kernel": adapter})
    _, two = trained(params, {"layers/kernel": adapter}, 1)
    bank = flora.AdapterBank(plan, capacity=3)
    bank.load("one", one)
    bank.load("two", two)
    x = r(3, 5, 8)

    def run(slots, rows, **kw):
        bound = flora.bind(params, slots, plan, rows=rows, **kw)
        from flora_jax.core import ops

        body = lambda x, layer: (ops.dot(x, layer["kernel"]) + layer["bias"], None)
        return jax.lax.scan(body, x, bound["layers"])[0]

    rows = bank.rows(["two", None, "one"])
    found = jax.jit(run)(bank.arrays, rows)
    expected = jax.jit(run)({"one": one, "two": two}, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if getattr(adapter, "dropout", 0.0):
        awake = run(bank.arrays, rows, rng=jax.random.key(0), train=True)
        assert np.abs(awake - found)[0].max() > 1e-3
        np.testing.assert_allclose(awake[1], found[1], rtol=1e-4, atol=1e-4)


def test_the_bank_refuses(family):
    _, trees, plan, padded = family
    bank = flora.AdapterBank(plan, capacity=2)
    with pytest.raises(ConfigError, match="capacity=0"):
        flora.AdapterBank(plan, capacity=0)
    with pytest.raises(StructureError, match="differ: missing"):
        bank.load("a", trees["a"])
    bank.load("a", padded["a"])
    with pytest.raises(ConfigError, match="unknown adapter 'b'; nearest: a"):
        bank.rows(["a", "b"])
    with pytest.raises(StructureError, match="take rows"):
        flora.bind({}, bank.arrays, plan)
    vector = flora.plan({"norm": {"scale": jnp.ones(3)}}, {".*": flora.Replace()})
    with pytest.raises(PlanError, match="norm/scale: Replace on a vector weight"):
        flora.AdapterBank(vector, capacity=1)
