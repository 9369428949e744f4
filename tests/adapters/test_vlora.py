"""VLoRA: the generator, skipped layers, counts, decoding with weights made once, a mesh step."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import simulated

import flora_jax as flora
from flora_jax import training
from flora_jax.adapters import perceptual, vlora
from flora_jax.core.errors import PlanError
from flora_jax.evaluation import generate
from flora_jax.models import Llama, LlamaConfig, registry
from flora_jax.training import losses

SMALL = {"rank": 2, "tokens": 3, "features": 4, "width": 8, "depth": 2, "heads": 2}
ATTENTION = "layers/self_attn/.*_proj/kernel"


def features(rows, seed=5):
    return jax.random.normal(jax.random.key(seed), (rows, 3, 4))


def moved(adapters, seed=9):
    """B away from zero, so that the generator is seen."""
    key = jax.random.key(seed)
    return {
        path: {
            n: a + 0.3 * jax.random.normal(key, a.shape) if n == "b" else a for n, a in t.items()
        }
        for path, t in adapters.items()
    }


def small_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    model = Llama(LlamaConfig.tiny(num_key_value_heads=1, vocab_size=32, eos_token_id=0, **sizes))
    params = registry.init(model, jax.random.key(0))
    plan = flora.plan(params, {ATTENTION: flora.VLoRA(**SMALL)})
    return model, params, plan, flora.init(plan, jax.random.key(1), params)


@pytest.fixture(scope="module")
def llama():
    return small_llama()


def generator_count(d, depth, queries, n_in, rank):
    """The card's formula of one weight type."""
    layer = 2 * (4 * d * d + 4 * d) + 8 * d * d + 5 * d + 6 * d
    return queries * d + depth * layer + 2 * d + (d + 1) * n_in * rank


@pytest.mark.parametrize("skip", [1, 4])
def test_the_cards_count(skip):
    layers, width, d, n, tokens, d_v, r = 8, 128, 32, 3, 12, 24, 4
    kernel = {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}
    params = {"layers": dict.fromkeys(("q", "k", "v", "o"), kernel)}
    sizes = {"tokens": tokens, "features": d_v, "width": d, "depth": n, "heads": 4}
    plan = flora.plan(params, {".*": flora.VLoRA(rank=r, skip=skip, **sizes)})
    served = layers // skip
    visual = d_v * d + d + tokens * d
    each = generator_count(d, n, served, width, r) + served * width * r
    assert plan.count == visual + 4 * each


def test_grouped_queries_have_their_own_output_sizes(llama):
    _, _, plan, _ = llama
    sizes = {entry.path.split("/")[2]: {n: s for n, s, _ in entry.train} for entry in plan}
    assert sizes["q_proj"]["b"] == (2, 2, 16) and sizes["k_proj"]["b"] == (2, 2, 8)


def test_generator_learns_only_after_b_has_moved(llama):
    """At init dL/dB is not 0 and dL/d(generator) is; afterwards both are not."""
    model, params, plan, adapters = llama
    tokens, v = jnp.ones((2, 5), jnp.int32), features(2)

    @jax.jit
    def grads(adapters):
        def loss(adapters):
            bound = flora.bind(params, adapters, plan, example=v)
            return jnp.sum(jax.nn.log_softmax(model.apply({"params": bound}, tokens)[0])[..., 3])

        return jax.grad(loss)(adapters)

    first, later = grads(adapters), grads(moved(adapters))
    assert all(np.abs(first[e.path]["b"]).max() > 0 for e in plan)
    assert all((np.asarray(g) == 0).all() for g in first["pool/VLoRA"].values())
    silent = {n for n, g in later["pool/VLoRA"].items() if not np.abs(g).max() > 0}
    assert all(".key.bias" in name for name in silent)


def test_rows_depend_on_their_own_image_alone(llama):
    """The Jacobian of the factors is block-diagonal; the logits of row 0 ignore row 1's image."""
    model, params, plan, adapters = llama
    pool, pools = adapters["pool/VLoRA"], plan.pools
    f = lambda v: pools[0].adapter.generate(pool, v, plan.entries)["layers/self_attn/q_proj/kernel"]
    jacobian = jax.jit(jax.jacrev(lambda v: f(v)["a"].sum((0, 2, 3))))(features(3))
    for row in range(3):
        for image in range(3):
            assert (np.abs(jacobian[row, image]).max() > 0) == (row == image)

    run = jax.jit(
        lambda v: model.apply(
            {"params": flora.bind(params, moved(adapters), plan, example=v)},
            jnp.ones((2, 4), jnp.int32),
        )[0]
    )
    v = features(2)
    before, after = run(v), run(v.at[1].add(1.0))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-4


def test_tokens_without_positions_are_a_set():
    sizes = perceptual.Sizes(3, 4, 8, 2, 2, 4)
    own = perceptual.init_generator(jax.random.key(0), sizes, 2, 6, 2)
    own = jax.tree.map(lambda a: 20 * a, own)  # away from nearly uniform attention
    visual = perceptual.init_visual(jax.random.key(1), sizes)
    run = lambda p, v: perceptual.generate_factors(own, perceptual.visual_tokens(p, v), 2, 2)
    bare = {**visual, "visual.position": jnp.zeros((3, 8))}
    v, order = features(2), jnp.array([2, 0, 1])
    a = run(bare, v)
    assert a.shape == (2, 2, 6, 2)
    np.testing.assert_allclose(run(bare, v[:, order]), a, atol=1e-3 * np.abs(a).max())
    assert np.abs(run(visual, v[:, order]) - run(visual, v)).max() > 1e-2 * np.abs(a).max()


def test_skip_serves_every_second_layer():
    stack = {"layers": {"kernel": jax.random.normal(jax.random.key(2), (5, 6, 6))}}
    plan = flora.plan(stack, {".*": flora.VLoRA(**SMALL, skip=2)})
    adapters = moved(flora.init(plan, jax.random.key(1), stack))
    assert adapters["layers/kernel"]["b"].shape == (2, 2, 6)
    assert adapters["pool/VLoRA"]["layers:queries"].shape == (2, 8)
    merged = flora.materialize(flora.bind(stack, adapters, plan, example=features(1)))
    change = np.abs(merged["layers"]["kernel"] - stack["layers"]["kernel"]).max((1, 2))
    np.testing.assert_array_equal(change > 0, [False, True, False, True, False])


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"heads": 3}, (2, 6, 6), "heads=3 must divide width=8"),
        ({"skip": 3}, (2, 6, 6), "skip=3 leaves none of 2 layers"),
        ({"rank": 7}, (2, 6, 6), "rank=7 is outside 1..6"),
    ],
)
def test_what_does_not_fit(changes, shape, message):
    stack = {"layers": {"kernel": jnp.zeros(shape)}}
    with pytest.raises(PlanError, match=f"^layers/kernel: {message}"):
        flora.plan(stack, {".*": flora.VLoRA(**{**SMALL, **changes})})


def test_skip_needs_a_stack_and_features_must_fit(llama):
    with pytest.raises(PlanError, match="skip=2 counts the layers of one scanned stack"):
        flora.plan({"kernel": jnp.zeros((6, 6))}, {".*": flora.VLoRA(**SMALL, skip=2)})
    _, params, plan, adapters = llama
    with pytest.raises(PlanError, match=r"example \(2, 5, 4\) is not \[rows, tokens, features\]"):
        flora.bind(params, adapters, plan, example=jnp.zeros((2, 5, 4)))
    with pytest.raises(PlanError, match="pool/VLoRA: .* pass example="):
        flora.bind(params, adapters, plan)


def test_weight_types_of_unrolled_blocks_are_in_their_order():
    names = [f"layers_{i}/{p}/kernel" for i in (0, 10, 2) for p in ("q", "k")]
    params = {n.split("/")[0]: {} for n in names}
    for name in names:
        block, part, _ = name.split("/")
        params[block][part] = {"kernel": jnp.zeros((6, 6))}
    plan = flora.plan(params, {".*": flora.VLoRA(**SMALL)})
    types = vlora.weight_types(plan.entries)
    assert {n: [e.path for e in t] for n, t in types.items()} == {
        f"layers.{p}": [f"layers_{i}/{p}/kernel" for i in (0, 2, 10)] for p in ("k", "q")
    }


def test_decoding_generates_the_weights_once(llama, monkeypatch):
    """Bound outside the loop: one generation for many tokens, equal to the full forward."""
    model, params, plan, adapters = llama
    calls = []
    real = perceptual.generate_factors
    count = lambda *args: calls.append(1) or real(*args)
    monkeypatch.setattr(perceptual, "generate_factors", count)
    bound = flora.bind(params, moved(adapters), plan, example=features(2))
    assert len(calls) == 4  # a generator for each of q, k, v and o
    prompts = [[3, 4, 5], [6, 7]]
    made = generate(model, bound, prompts, max_new_tokens=5, eos_id=())
    assert len(calls) == 4
    for row, (prompt, new) in enumerate(zip(prompts, made)):
        alone = flora.bind(params, moved(adapters), plan, example=features(2)[row : row + 1])
        merged = flora.materialize(alone)
        logits, _ = model.apply({"params": merged}, jnp.array([prompt + new[:-1]]))
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == new
        # One row's weights serve a batch of any size.
        both = model.apply({"params": alone}, jnp.array([prompt + new[:-1]] * 2))[0]
        np.testing.assert_allclose(both[1], logits[0], atol=1e-5)


def test_a_step_on_eight_devices_is_that_of_one():
    command = [sys.executable, __file__]
    subprocess.run(command, env=simulated(8), check=True, timeout=300)


def step_on_a_mesh():
    """The pool is replicated, batch and features sharded: the same loss, the same moments."""
    model, params, plan, adapters = small_llama()
    batch = {
        "tokens": jax.random.randint(jax.random.key(3), (8, 6), 1, 32),
        "targets": jax.random.randint(jax.random.key(4), (8, 6), 1, 32),
        "example": features(8),
    }
    optimizer = training.AdamW(learning_rate=1e-2)
    state = training.create_state(plan, moved(adapters), optimizer, 0)
    step = training.make_step(losses.CausalLM(model=model), plan, optimizer, donate=False)
    alone, metrics = step(state, params, batch)

    mesh = training.make_mesh({"data": 8})
    specs = training.base_specs(params, mesh)
    spread = jax.device_put(state, training.state_shardings(state, plan, specs, mesh))
    sharded = jax.device_put(batch, training.batch_sharding(mesh))
    base = jax.device_put(params, training.base_shardings(params, mesh))
    many, found = step(spread, base, sharded)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, many.opt_state, alone.opt_state)


if __name__ == "__main__":
    step_on_a_mesh()
