"""Prompt tuning and prefix tuning: what they compute, wherever a model can be run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, PlanError, StructureError
from flora_jax.data import with_prompt
from flora_jax.evaluation import generate
from flora_jax.models import Bert, BertConfig, Llama, LlamaConfig, ViT, ViTConfig, registry
from flora_jax.training.losses import CausalLM, Classification

CONFIG = LlamaConfig.tiny(vocab_size=50, hidden_size=16, num_attention_heads=4, head_dim=4)
CONFIG = dataclasses.replace(CONFIG, num_key_value_heads=2, tie_word_embeddings=True)
V, D, P = 50, 16, 3
TABLE = "embed_tokens/embedding"
KV = r"layers/self_attn/(k|v)_proj/kernel"
TOKENS = jax.random.randint(jax.random.key(9), (2, 6), 0, V)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


@pytest.fixture(autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def llama():
    model = Llama(CONFIG)
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    # Larger than at init, so that nothing here is nearly uniform.
    return model, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)


def adapted(params, rules, seed=1):
    plan = flora.plan(params, rules)
    adapters = flora.init(plan, jax.random.key(seed), params)
    return plan, adapters, flora.bind(params, adapters, plan)


def hidden(model, params, tokens, **options):
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, output="hidden", **options)[0])
    return run(params, tokens)


# Prompt tuning ----------------------------------------------------------------------------------
def test_virtual_ids_are_rows_after_the_table():
    params = {"embedding": jax.random.normal(jax.random.key(0), (12, 8))}
    _, adapters, bound = adapted(params, {"embedding": flora.PromptTuning(tokens=P)})
    prompt = adapters["embedding"]["prompt"]
    assert prompt.shape == (P, 8) and 0.5 < np.std(prompt) < 1.5
    ids = jnp.array([[12, 0, 14], [5, 13, 11]])
    want = jnp.concatenate([params["embedding"], prompt])[ids]
    np.testing.assert_array_equal(ops.embed(ids, bound["embedding"]), want)
    assert np.isnan(ops.embed(jnp.array([15]), bound["embedding"])).all(), "past the prompt"
    x = jax.random.normal(jax.random.key(1), (4, 8))
    np.testing.assert_array_equal(
        ops.attend(x, bound["embedding"]), ops.attend(x, params["embedding"])
    )
    assert ops.virtual_rows(bound) == ((12, 13, 14), None)
    assert ops.virtual_rows(params) is None
    with pytest.raises(PlanError, match="^embedding: PromptTuning .* does not merge"):
        flora.materialize(bound)


@pytest.mark.parametrize("low", [None, "int8", "bfloat16"])
def test_a_prompt_on_other_bases_and_beside_lora(low):
    params = {"embedding": jax.random.normal(jax.random.key(0), (12, 8))}
    if low == "bfloat16":
        params = {"embedding": params["embedding"].astype(jnp.bfloat16)}
    elif low:
        params = flora.quantize(params, {"embedding": flora.Format(low)})
    plain = flora.dequantize(params)["embedding"]
    plan, adapters, bound = adapted(params, {"embedding": flora.PromptTuning(tokens=P)})
    lora = flora.plan(params, {"embedding": flora.LoRA(rank=2)})
    b = jax.tree.map(lambda a: a + 0.1, flora.init(lora, jax.random.key(2), params))
    ids = jnp.array([12, 3, 14, 11])
    table = jnp.concatenate([plain, adapters["embedding"]["prompt"].astype(plain.dtype)])
    got = ops.embed(ids, bound["embedding"])
    assert got.dtype == plain.dtype
    close(got, table[ids])

    both = flora.bind(params, {"p": adapters, "l": b}, {"p": plan, "l": lora})
    delta = jnp.concatenate([b["embedding"]["a"] @ b["embedding"]["b"] * 4, jnp.zeros((P, 8))])
    close(ops.embed(ids, both["embedding"]), (table + delta.astype(table.dtype))[ids], 2e-2)


def test_prompt_starts_and_counts():
    params = {"embedding": jax.random.normal(jax.random.key(0), (12, 8))}
    start = lambda adapter: adapted(params, {".*": adapter})[1]["embedding"]["prompt"]
    text = start(flora.PromptTuning(tokens=5, init_from="text", ids=(7, 2)))
    np.testing.assert_array_equal(text, params["embedding"][jnp.array([7, 2, 7, 2, 7])])
    some = start(flora.PromptTuning(tokens=30, init_from="vocabulary"))
    rows = {tuple(row) for row in np.asarray(params["embedding"])}
    found = {tuple(row) for row in np.asarray(some)}
    assert found <= rows and len(found) > 3
    big = {"embedding": jax.ShapeDtypeStruct((128256, 3072), jnp.float32)}
    plan = flora.plan(big, {".*": flora.PromptTuning(tokens=200)})
    assert plan.count == 614_400
    assert flora.Plan.from_json(plan.to_json()) == plan
    for bad, message in [
        (flora.PromptTuning(tokens=0), "tokens=0"),
        (flora.PromptTuning(init_from="words"), "random, vocabulary or text"),
        (flora.PromptTuning(init_from="text"), "needs ids="),
        (flora.PromptTuning(init_from="text", ids=(12,)), "id 12 is outside the table of 12"),
    ]:
        with pytest.raises(PlanError, match=f"^embedding: .*{message}"):
            flora.plan(params, {".*": bad})
    with pytest.raises(PlanError, match="^kernel: PromptTuning takes embedding weights"):
        flora.plan({"kernel": jnp.zeros((4, 4))}, {".*": flora.PromptTuning()})


def longer(model, params, prompt):
    """The same model with the prompt as ordinary words."""
    config = dataclasses.replace(model.config, vocab_size=V + len(prompt))
    table = jnp.concatenate([params["embed_tokens"]["embedding"], prompt])
    return Llama(config), params | {"embed_tokens": {"embedding": table}}


def test_the_loss_with_a_prompt(llama):
    """Tokens behind the prompt: loss and gradients of the model whose vocabulary holds it."""
    model, params = llama
    plan, adapters, bound = adapted(params, {TABLE: flora.PromptTuning(tokens=P)})
    batch = {"tokens": TOKENS, "targets": jnp.roll(TOKENS, -1, axis=1)}
    loss = CausalLM(model=model, chunk=None)

    @jax.jit
    def ours(adapters):
        total, weight, _ = loss(flora.bind(params, adapters, plan), batch, None, True)
        return total / weight

    @jax.jit
    def theirs(prompt):
        big, tree = longer(model, params, prompt)
        ids = jnp.broadcast_to(jnp.arange(V, V + P), (2, P))
        logits, _ = big.apply({"params": tree}, jnp.concatenate([ids, TOKENS], axis=1))
        logits = jax.nn.log_softmax(logits[:, P:, :V])
        return -jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1).mean()

    (value, grads), prompt = jax.value_and_grad(ours)(adapters), adapters[TABLE]["prompt"]
    want, gradient = jax.value_and_grad(theirs)(prompt)
    close(value, want)
    close(grads[TABLE]["prompt"], gradient)
    assert np.abs(gradient).max() > 1e-3


def test_packed_texts_each_see_the_prompt(llama):
    model, params = llama
    bound = adapted(params, {TABLE: flora.PromptTuning(tokens=P)})[2]
    packed = {
        "tokens": TOKENS[:1],
        "targets": TOKENS[:1],
        "loss_mask": jnp.ones((1, 6)),
        "positions": jnp.array([[0, 1, 2, 3, 0, 1]]),
        "segment_ids": jnp.array([[1, 1, 1, 1, 2, 2]]),
    }
    new = with_prompt(bound, packed)
    assert {name: a.shape for name, a in new.items()} == dict.fromkeys(packed, (1, P + 6))
    assert new["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 4]]
    assert new["loss_mask"].sum() == 6 and (new["loss_mask"][:, :P] == 0).all()
    one = lambda batch: hidden(
        model,
        bound,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
    )[:, P:]
    apart = [one(with_prompt(bound, {"tokens": t})) for t in (TOKENS[:1, :4], TOKENS[:1, 4:])]
    close(one(new), jnp.concatenate(apart, axis=1))


def test_rows_choose_their_prompt(llama):
    model, params = llama
    rule = {TABLE: flora.PromptTuning(tokens=P)}
    plan, one, first = adapted(params, rule)
    _, two, second = adapted(params, rule, seed=2)
    tokens = jnp.concatenate([TOKENS, TOKENS[:1]])
    plans = {"one": plan, "two": plan}
    mixed = lambda rows: flora.bind(params, {"one": one, "two": two}, plans, rows=rows)

    @jax.jit
    def run(rows):
        bound = mixed(rows)
        batch = with_prompt(bound, {"tokens": tokens})
        ids, where = batch["tokens"], {k: batch[k] for k in ("positions", "segment_ids")}
        return model.apply({"params": bound}, ids, output="hidden", **where)[0][:, P:]

    got = run(jnp.array([1, 0, -1]))
    for n, tree in enumerate((second, first, params)):
        batch = with_prompt(tree, {"tokens": tokens[n : n + 1]})
        want = hidden(model, tree, batch["tokens"])[:, -6:]
        close(got[n : n + 1], want, 5e-5)
    with pytest.raises(ConfigError, match="with and without a trained prompt"):
        generate(model, mixed(jnp.array([1, -1, 0])), [[1], [2], [3]])
    other = flora.plan(params, {TABLE: flora.PromptTuning(tokens=P + 1)})
    trees = {"one": one, "two": flora.init(other, jax.random.key(0), params)}
    bound = flora.bind(params, trees, {"one": plan, "two": other}, rows=jnp.array([0, 1, 1]))
    with pytest.raises(PlanError, match=r"different lengths at one table: \[3, 4\]"):
        with_prompt(bound, {"tokens": tokens})


def greedy(forward, prompt, count):
    """Token by token, each time the whole text; what follows it is not seen."""
    out = list(prompt)
    for _ in range(count):
        logits = forward(jnp.array([out + [0] * (8 - len(out))]))
        out.append(int(np.argmax(logits[0, len(out) - 1])))
    return out[len(prompt) :]


def test_generation_stands_behind_the_prompt(llama):
    model, params = llama
    _, adapters, bound = adapted(params, {TABLE: flora.PromptTuning(tokens=P)})
    big, tree = longer(model, params, adapters[TABLE]["prompt"])
    ids = jnp.arange(V, V + P)[None]

    @jax.jit
    def forward(tokens):
        logits, _ = big.apply({"params": tree}, jnp.concatenate([ids, tokens], axis=1))
        return logits[:, P:, :V]

    prompts = [[3, 1, 4], [5]]
    new = generate(model, bound, prompts, max_new_tokens=4, eos_id=())
    assert new == [greedy(forward, prompt, 4) for prompt in prompts]
    assert new != generate(model, params, prompts, max_new_tokens=4, eos_id=())
    with pytest.raises(ConfigError, match=f"token {V}, the vocabulary {V}"):
        generate(model, bound, [[V]])
    room = model.config.max_position_embeddings - P
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        generate(model, bound, [[1] * room], max_new_tokens=1)


def test_a_prompt_before_a_classifiers_tokens():
    model = Bert(BertConfig.tiny(num_labels=3, pooling="mean"))
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    path = "embeddings/word_embeddings/embedding"
    bound = adapted(params, {path: flora.PromptTuning(tokens=2)})[2]
    batch = {
        "tokens": TOKENS,
        "mask": jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0),
        "token_types": jnp.zeros((2, 6), jnp.int32),
        "label": jnp.array([0, 2]),
    }
    new = with_prompt(bound, batch)
    assert new["tokens"][:, :2].tolist() == [[100, 101]] * 2
    assert new["mask"].sum() == 2 * 2 + 6 + 4
    loss = Classification(model=model, inputs=("tokens", "mask", "token_types"))
    logits = model.apply({"params": bound}, new["tokens"], new["mask"], new["token_types"])
    want = -jax.nn.log_softmax(logits)[jnp.arange(2), batch["label"]].sum()
    close(loss(bound, batch, None, True)[0], want)


# Prefix tuning ----------------------------------------------------------------------------------
def by_hand(model, params, adapters, tokens):
    """A Llama whose cache already holds the prefix: its own decoder, positions from P on."""
    cache = model.init_cache(len(tokens), P + tokens.shape[1])
    for name in "kv":
        table = adapters[f"layers/self_attn/{name}_proj/kernel"]["prefix"]
        table = table.reshape(len(table), 1, P, 2, 4)
        cache[name] = cache[name].at[:, :, :P].set(table)
    positions = jnp.broadcast_to(jnp.arange(P, P + tokens.shape[1]), tokens.shape)
    run = jax.jit(
        lambda p, c: model.apply(
            {"params": p}, tokens, positions=positions, cache=c, output="hidden"
        )
    )
    return run(params, cache)[0]


def test_a_prefix_is_what_a_cache_with_its_keys_gives(llama):
    model, params = llama
    plan, adapters, bound = adapted(params, {KV: flora.PrefixTuning(tokens=P)})
    assert plan.count == 2 * 2 * P * 8
    want = by_hand(model, params, adapters, TOKENS)
    got = hidden(model, bound, TOKENS)
    close(got, want, 5e-5)
    assert np.abs(got - hidden(model, params, TOKENS)).max() > 0.1
    loss = lambda a, m: jnp.mean(m.apply({"params": flora.bind(params, a, plan)}, TOKENS)[0] ** 2)
    grads = jax.jit(jax.grad(loss), static_argnums=1)
    own = grads(adapters, model)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(own))
    jax.tree.map(close, own, grads(adapters, Llama(dataclasses.replace(CONFIG, remat="full"))))


def test_prefix_of_an_unrolled_model(llama):
    model, params = llama
    _, adapters, bound = adapted(params, {KV: flora.PrefixTuning(tokens=P)})
    loop = Llama(dataclasses.replace(CONFIG, scan_layers=False))
    flat = {k: v for k, v in params.items() if k != "layers"}
    flat |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)}
    plan = flora.plan(flat, {KV: flora.PrefixTuning(tokens=P)})
    own = {
        f"layers_{i}/self_attn/{n}_proj/kernel": jax.tree.map(
            lambda x, i=i: x[i], adapters[f"layers/self_attn/{n}_proj/kernel"]
        )
        for i in range(2)
        for n in "kv"
    }
    close(hidden(loop, flora.bind(flat, own, plan), TOKENS), hidden(model, bound, TOKENS))
    uneven = {f"layers_{i}/.*/(k|v)_proj/kernel": flora.PrefixTuning(tokens=2 + i) for i in (0, 1)}
    bound = adapted(flat, uneven)[2]
    with pytest.raises(PlanError, match="a prefix of 3 tokens, another weight has 2"):
        hidden(loop, bound, TOKENS)


def test_packed_texts_each_see_the_prefix(llama):
    model, params = llama
    bound = adapted(params, {KV: flora.PrefixTuning(tokens=P)})[2]
    got = hidden(
        model,
        bound,
        TOKENS[:1],
        positions=jnp.array([[0, 1, 2, 3, 0, 1]]),
        segment_ids=jnp.array([[1, 1, 1, 1, 2, 2]]),
    )
    apart = [hidden(model, bound, t) for t in (TOKENS[:1, :4], TOKENS[:1, 4:])]
    close(got, jnp.concatenate(apart, axis=1))


def test_a_window_does_not_hide_the_prefix(llama):
    model, params = llama
    _, adapters, bound = adapted(params, {KV: flora.PrefixTuning(tokens=P)})
    narrow = Llama(dataclasses.replace(CONFIG, sliding_window=1))
    assert np.abs(hidden(narrow, bound, TOKENS) - hidden(narrow, params, TOKENS)).max() > 0.1
    changed = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % V)
    close(hidden(narrow, bound, TOKENS)[:, 1:], hidden(narrow, bound, changed)[:, 1:])


def test_generation_behind_a_prefix(llama):
    model, params = llama
    bound = adapted(params, {KV: flora.PrefixTuning(tokens=P)})[2]
    forward = jax.jit(lambda tokens: model.apply({"params": bound}, tokens)[0])
    prompts = [[3, 1, 4], [5]]
    new = generate(model, bound, prompts, max_new_tokens=4, eos_id=())
    assert new == [greedy(forward, prompt, 4) for prompt in prompts]
    assert new != generate(model, params, prompts, max_new_tokens=4, eos_id=())
    room = model.config.max_position_embeddings - P
    with pytest.raises(ConfigError, match="behind a prefix of 3 do not fit"):
        generate(model, bound, [[1] * room], max_new_tokens=1)


def test_rows_choose_their_prefix(llama):
    """Two prefixes, a longer one, a LoRA on the same kernels and the base, in one batch."""
    model, params = llama
    rule = {KV: flora.PrefixTuning(tokens=P)}
    trees = {
        "one": adapted(params, rule),
        "two": adapted(params, rule, seed=2),
        "long": adapted(params, {KV: flora.PrefixTuning(tokens=P + 2)}, seed=3),
        "lora": adapted(params, {KV: flora.LoRA(rank=2)}),
    }
    moved = jax.tree.map(lambda a: a + 0.1, trees["lora"][1])
    trees["lora"] = (trees["lora"][0], moved, flora.bind(params, moved, trees["lora"][0]))
    adapters = {name: tree[1] for name, tree in trees.items()}
    plans = {name: tree[0] for name, tree in trees.items()}
    tokens = jnp.concatenate([TOKENS, TOKENS, TOKENS[:1]])

    @jax.jit
    def run(rows):
        bound = flora.bind(params, adapters, plans, rows=rows)
        return model.apply({"params": bound}, tokens, output="hidden")[0]

    alone = {name: hidden(model, tree[2], tokens) for name, tree in trees.items()}
    alone["base"] = hidden(model, params, tokens)
    for rows in ([1, 0, -1, 3, 2], [2, 2, 3, -1, 0]):
        got = run(jnp.array(rows))
        for n, row in enumerate(rows):
            name = list(trees)[row] if row >= 0 else "base"
            close(got[n], alone[name][n], 5e-5)
    assert run._cache_size() == 1


def test_projection_trains_a_shared_network(llama):
    model, params = llama
    adapter = flora.PrefixTuning(tokens=P, projection=5)
    plan, adapters, bound = adapted(params, {KV: adapter})
    assert plan.count == 2 * 2 * (5 * 8 + 8) + P * 8 + 8 * 5 + 5
    pool = adapters["pool/PrefixTuning"]
    table = {
        path: {"prefix": jax.vmap(lambda a: adapter.table(a, pool))(adapters[path])}
        for path in (e.path for e in plan)
    }
    plain = flora.plan(params, {KV: flora.PrefixTuning(tokens=P)})
    close(hidden(model, bound, TOKENS), hidden(model, flora.bind(params, table, plain), TOKENS))
    loss = lambda a: jnp.sum(hidden(model, flora.bind(params, a, plan), TOKENS)[0] * 2)
    grads = jax.grad(loss)(adapters)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    zero = adapted(params, {KV: flora.PrefixTuning(tokens=P, init_from="zero")})[1]
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(zero))


def test_prefixes_on_low_bit_and_bfloat16_bases(llama):
    model, params = llama
    low = flora.quantize(params, {KV: flora.Format("int8")})
    plan, adapters, bound = adapted(low, {KV: flora.PrefixTuning(tokens=P)})
    plain = flora.bind(flora.dequantize(low), adapters, plan)
    close(hidden(model, bound, TOKENS), hidden(model, plain, TOKENS))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    small = Llama(dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"))
    got = hidden(small, flora.bind(half, adapters, plan), TOKENS)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - hidden(model, bound, TOKENS)).mean() < 0.1


def test_prefix_mistakes_are_errors(llama):
    model, params = llama
    one = adapted(params, {"layers/self_attn/k_proj/kernel": flora.PrefixTuning(tokens=P)})[2]
    with pytest.raises(PlanError, match="layers/self_attn: the key projection has a prefix, the v"):
        hidden(model, one, TOKENS)
    q = adapted(params, {"layers/self_attn/q_proj/kernel": flora.PrefixTuning(tokens=P)})[2]
    with pytest.raises(PlanError, match=r"not taken by the attention \(ops.prefix\)"):
        hidden(model, q, TOKENS)
    kernel = {"kernel": jnp.ones((4, 8))}
    plan, adapters, bound = adapted(kernel, {"kernel": flora.PrefixTuning(tokens=P)})
    with pytest.raises(PlanError, match="PrefixTuning entries of a weight of shape"):
        ops.dot(jnp.ones((2, 4)), bound["kernel"])
    with pytest.raises(PlanError, match="^kernel: PrefixTuning .* does not merge"):
        flora.materialize(bound)
    rows = flora.bind(kernel, {"a": adapters}, {"a": plan}, rows=jnp.array([0, -1]))
    with pytest.raises(PlanError, match="not taken by the attention"):
        ops.dot(jnp.ones((2, 4)), rows["kernel"])
    with pytest.raises(PlanError, match="^kernel: PrefixTuning entries neither add up"):
        flora.bind(kernel, {"a": adapters, "b": adapters}, {"a": plan, "b": plan})
    with pytest.raises(PlanError, match="nor have weights"):
        flora.bind(kernel, {"a": adapters}, {"a": plan}, weights={"a": 0.5})
    for bad, message in [
        (flora.PrefixTuning(tokens=0), "tokens=0"),
        (flora.PrefixTuning(init_from="ones"), "random or zero"),
        (flora.PrefixTuning(projection=-1), "projection=-1"),
    ]:
        with pytest.raises(PlanError, match=f"^kernel: .*{message}"):
            flora.plan(kernel, {".*": bad})


def test_prefix_beside_a_lora_on_the_same_kernels(llama):
    model, params = llama
    plan, adapters, _ = adapted(params, {KV: flora.PrefixTuning(tokens=P)})
    lora, more, _ = adapted(params, {KV: flora.LoRA(rank=2)})
    more = jax.tree.map(lambda a: a + 0.1, more)
    both = flora.bind(params, {"p": adapters, "l": more}, {"p": plan, "l": lora})
    merged = flora.materialize(flora.bind(params, more, lora))
    close(hidden(model, both, TOKENS), by_hand(model, merged, adapters, TOKENS), 5e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_prefixes_of_encoders(kind):
    """Every query sees the prefix; BERT's positions start behind it; padding stays hidden."""
    if kind == "bert":
        model, inputs = Bert(BertConfig.tiny()), TOKENS
    else:
        model = ViT(ViTConfig.tiny())
        inputs = jax.random.normal(jax.random.key(5), (2, 8, 8, 1))
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    rule = {r".*/(key|value)/kernel": flora.PrefixTuning(tokens=P)}
    plan, adapters, bound = adapted(params, rule)
    run = jax.jit(
        lambda tree, *rest, **how: model.apply({"params": tree}, inputs, *rest, **how),
        static_argnames="output",
    )
    plain, got = run(params), run(bound)
    assert got.shape == plain.shape and np.abs(got - plain).max() > 1e-2
    mixed = flora.bind(params, {"a": adapters}, {"a": plan}, rows=jnp.array([0, -1]))
    close(run(mixed), jnp.stack([got[0], plain[1]]))
    if kind == "vit":
        return
    first = run(bound, output="layers")[0]
    close(first, run(params, positions=jnp.arange(P, P + 6), output="layers")[0])
    mask = jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0)
    other = jax.jit(model.apply)({"params": bound}, TOKENS.at[1, 4:].set(1), mask)
    close(run(bound, mask)[1, :4], other[1, :4])
    with pytest.raises(StructureError, match="38 tokens behind a prefix of 3, but .* holds 40"):
        model.apply({"params": bound}, jnp.ones((1, 38), jnp.int32))
