"""Generation against teacher forcing, adapters as arguments, sampling laws, stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import models
from flora_jax.attention import Softmax
from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import map_with_path
from flora_jax.core.registry import register
from flora_jax.evaluation import Sampling, generate, generate_text, stream, stream_text
from flora_jax.evaluation.generate import choose
from flora_jax.models import Llama, LlamaConfig

PROMPTS = [[5, 9, 200], [7, 1, 4, 88, 31, 250, 17], [42]]


def random_params(model, seed=0):
    """Parameters from numpy: compiling the real initialisers takes seconds."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = 0.2 * rng.standard_normal(shape.shape) + path.endswith("scale")
        return jnp.asarray(value, shape.dtype)

    return map_with_path(leaf, models.abstract(model))


@pytest.fixture(scope="module")
def tiny():
    model = Llama(LlamaConfig.tiny(eos_token_id=None))
    return model, random_params(model)


def greedy(model, params, prompt, n):
    """The slow way: the whole text again for every token."""
    ids = np.zeros((1, 32), np.int32)
    ids[0, : len(prompt)] = prompt
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids)[0].argmax(-1))
    for end in range(len(prompt), len(prompt) + n):
        ids[0, end] = forward(ids)[0, end - 1]
    return ids[0, len(prompt) : len(prompt) + n].tolist()


@pytest.fixture(scope="module")
def expected(tiny):
    return [greedy(*tiny, prompt, 10) for prompt in PROMPTS]


def test_batch_of_unequal_prompts_equals_teacher_forcing(tiny, expected):
    assert generate(*tiny, PROMPTS, max_new_tokens=10) == expected


def test_stream_equals_generate(tiny, expected):
    columns = list(stream(*tiny, PROMPTS, max_new_tokens=10))
    assert np.stack(columns, 1).tolist() == expected


def test_unrolled_model_generates_the_same(tiny, expected):
    model, params = tiny
    layers = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(2)}
    separate = {k: v for k, v in params.items() if k != "layers"} | layers
    unrolled = Llama(LlamaConfig.tiny(eos_token_id=None, scan_layers=False))
    assert generate(unrolled, separate, PROMPTS[:1], max_new_tokens=10) == expected[:1]


def test_rows_end_at_their_eos(tiny, expected):
    eos = expected[0][3]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert len(cut[0]) <= 4
    assert generate(*tiny, PROMPTS, max_new_tokens=10, eos_id=eos) == cut
    columns = np.stack(list(stream(*tiny, PROMPTS, max_new_tokens=10, eos_id=[eos, 999])), 1)
    assert [[t for t in row if t >= 0] for row in columns.tolist()] == cut
    only = list(stream(*tiny, PROMPTS[:1], max_new_tokens=10, eos_id=eos))
    assert len(only) == len(cut[0])


def test_adapters_as_an_argument(tiny, expected):
    model, params = tiny
    plan = flora.plan(params, {r".*/(q|v)_proj/kernel": flora.LoRA(rank=2, alpha=4)})
    adapters = flora.init(plan, jax.random.key(1), params)
    bound = flora.bind(params, adapters, plan)
    assert generate(model, bound, PROMPTS, max_new_tokens=10) == expected
    noise = lambda a: 0.3 * jax.random.normal(jax.random.key(2), a.shape)  # noqa: E731
    adapters = jax.tree.map(lambda a: a + noise(a), adapters)
    bound = flora.bind(params, adapters, plan)
    merged = flora.materialize(bound)
    adapted = generate(model, bound, PROMPTS, max_new_tokens=6)
    assert adapted == generate(model, merged, PROMPTS, max_new_tokens=6)
    assert adapted != [row[:6] for row in expected]


def test_sampling_laws():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(sampling):
        draw = lambda k: choose(logits, k, sampling.kind, sampling.numbers())[0]  # noqa: E731
        return np.bincount(jax.vmap(draw)(keys), minlength=4) / len(keys)

    np.testing.assert_allclose(
        frequencies(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03
    )
    np.testing.assert_allclose(
        frequencies(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03
    )
    np.testing.assert_allclose(
        frequencies(Sampling(temperature=1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.03
    )
    squares = np.asarray([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(
        frequencies(Sampling(temperature=0.5)), squares / squares.sum(), atol=0.03
    )
    assert frequencies(Sampling(temperature=1.0, top_p=0.01))[0] == 1
    assert frequencies(Sampling())[0] == 1
    # Top-p counts after top-k: 0.5 / 0.8 = 0.625 already reaches 0.6.
    assert frequencies(Sampling(temperature=1.0, top_k=2, top_p=0.6))[0] == 1


def test_sampling_repeats_with_its_key(tiny):
    hot = Sampling(temperature=1.5, top_k=50)
    options = {"max_new_tokens": 8, "sampling": hot}
    a = generate(*tiny, PROMPTS, key=jax.random.key(1), **options)
    assert a == generate(*tiny, PROMPTS, key=jax.random.key(1), **options)
    assert a != generate(*tiny, PROMPTS, key=jax.random.key(2), **options)
    columns = stream(*tiny, PROMPTS, key=jax.random.key(1), **options)
    assert np.stack(list(columns), 1).tolist() == a


def test_one_program_for_similar_lengths(tiny):
    traced = []

    class Counted(Softmax):
        def extend(self, *args):
            traced.append(1)
            return super().extend(*args)

    register("Counted", family="example", paper="", arxiv="")(Counted)
    model = Llama(dataclasses.replace(tiny[0].config, attention=Counted()))
    generate(model, tiny[1], [[1, 2, 3]], max_new_tokens=4)
    before = len(traced)
    assert before > 0
    generate(model, tiny[1], [[1, 2, 3, 4, 5]], max_new_tokens=7)
    assert len(traced) == before


def test_errors(tiny):
    with pytest.raises(ConfigError, match="at least one token"):
        generate(*tiny, [[1], []])
    with pytest.raises(ConfigError, match="max_position_embeddings=512"):
        generate(*tiny, [[1] * 500], max_new_tokens=20)
    with pytest.raises(ConfigError, match="vocabulary 256"):
        generate(*tiny, [[300]])
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=0.0)


@pytest.mark.real
def test_the_capital_of_france():
    from flora_jax import io

    try:
        path = io.find("smollm2-135m")
    except ConfigError as error:
        pytest.skip(str(error))
    model, params, tokenizer = io.load(path)
    options = {"max_new_tokens": 6, "eos_id": ()}
    (text,) = generate_text(model, params, tokenizer, "The capital of France is", **options)
    assert text.startswith(" Paris")
    pieces = stream_text(model, params, tokenizer, "The capital of France is", **options)
    assert "".join(pieces) == text
