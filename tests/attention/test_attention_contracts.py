"""The contracts of every attention variant."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BIDIRECTIONAL,
    CASES,
    CAUSAL,
    GENERATES,
    SIZES,
    T,
    attend,
    cut,
    layer,
    params_of,
    rows_from,
    takes,
    tokens_of,
)

import flora_jax as flora
from flora_jax import attention
from flora_jax.attention import Full, KeyValuePrefix
from flora_jax.core.errors import ConfigError


def close(a, b, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance)


def test_every_registered_variant_has_a_case():
    """The rest of the family are cells of their own: tests/attention/test_quantum.py."""
    variants = {m.cls for m in flora.methods("attention") if issubclass(m.cls, attention.Variant)}
    assert variants and variants <= {type(c.variant) for c in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_count_json_and_hash(name):
    case = CASES[name]
    case.variant.check(SIZES)
    shapes = jax.eval_shape(lambda: case.variant.init(jax.random.key(0), SIZES, jnp.float32))
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(shapes)) == case.count
    again = attention.from_json(case.variant.to_json())
    assert again == case.variant and hash(again) == hash(case.variant)


@pytest.mark.parametrize("name", GENERATES)
def test_prefill_and_decode_equal_training(name):
    """Rows of different length: a padded prefill, a second one, then a token at a time."""
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)
    whole = jax.jit(lambda p, t: attend(case, p, t)[0])(params, tokens)

    @jax.jit
    def prefill(params, state, tokens, start, valid):
        positions = start + jnp.arange(tokens["q"].shape[1])
        how = {"mode": "prefill", "state": state, "positions": positions, "valid": valid}
        return attend(case, params, tokens, start=start, **how)

    @jax.jit
    def decode(params, state, tokens, start):
        how = {"mode": "decode", "state": state, "positions": start}
        return attend(case, params, tokens, start=start, **how)

    state = case.variant.init_state(SIZES, 2, 16, jnp.float32, case.mask)
    shapes = jax.tree.map(jnp.shape, state)
    ends = np.zeros(2, int)
    for lengths in ([6, 4], [2, 6]):  # the second brings a row past what a small window holds
        part = rows_from(tokens, ends, 6)
        valid = jnp.arange(6) < jnp.asarray(lengths)[:, None]
        out, state = prefill(params, state, part, jnp.asarray(ends)[:, None], valid)
        for b, n in enumerate(lengths):
            close(out[b, :n], whole[b, ends[b] : ends[b] + n])
        ends = ends + lengths
    for _ in range(3):
        part = rows_from(tokens, ends, 1)
        out, state = decode(params, state, part, jnp.asarray(ends)[:, None])
        for b in range(2):
            close(out[b, 0], whole[b, ends[b]])
        ends = ends + 1
    assert jax.tree.map(jnp.shape, state) == shapes, "a state has one shape"


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_by_gradients(name):
    """No output moves with a later token; each with its own and, but for a window, the first."""
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)
    weights = jax.random.normal(jax.random.key(9), (SIZES.heads, SIZES.dim))

    @jax.jit
    def jacobian(tokens):
        return jax.jacrev(lambda t: (attend(case, params, t)[0] * weights).sum((0, 2, 3)))(tokens)

    moved = {
        part: np.abs(np.asarray(g)).sum(axis=(1, *range(3, g.ndim)))
        for part, g in jacobian(tokens).items()
    }
    for part, moves in moved.items():
        assert np.isfinite(moves).all()
        assert (np.triu(moves, 1) == 0).all(), f"{part} of a later token is seen"
    assert (np.diag(moved["v"]) > 0).all()
    if not isinstance(case.mask, attention.Sliding):
        assert (moved["v"][:, 0] > 0).all(), "the first token is forgotten"


@pytest.mark.parametrize("name", [n for n in takes("segment_ids") if n in CAUSAL])
def test_segments_do_not_see_each_other(name):
    case, tokens = CASES[name], tokens_of(batch=1)
    params = params_of(case)
    lengths = (2, 7, 4)
    segments = jnp.repeat(jnp.asarray([3, 1, 2]), jnp.asarray(lengths), total_repeat_length=T)[None]
    shared = jnp.where(segments == 3, -1, segments)
    # The rotation of a part starts where it lies in the packed row.
    alone = lambda t, low, high: attend(case, params, cut(t, low, high), start=low)[0]

    @jax.jit
    def everything(tokens):
        packed = attend(case, params, tokens, segment_ids=segments)[0]
        parts = [alone(tokens, low, high) for low, high in ((0, 2), (2, 9), (9, T))]
        seen = attend(case, params, tokens, segment_ids=shared)[0]
        return packed, jnp.concatenate(parts, axis=1), seen, alone(tokens, 0, 9)

    packed, parts, seen, both = everything(tokens)
    close(packed, parts)
    # What stands in segment -1 is seen by all.
    close(seen[:, :9], both)
    if not isinstance(case.mask, attention.Sliding):
        assert np.abs(seen[:, 9:] - packed[:, 9:]).max() > 1e-3


@pytest.mark.parametrize("name", takes("valid"))
def test_padding_is_not_seen(name):
    """Left of a causal row or right of a bidirectional one, whatever it holds."""
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)
    bidirectional = name in BIDIRECTIONAL
    mask = Full() if bidirectional else case.mask
    pads = slice(9, None) if bidirectional else slice(0, 4)
    valid = jnp.ones((2, T), bool).at[:, pads].set(False)
    real = slice(0, 9) if bidirectional else slice(4, None)
    part = cut(tokens, real.start, real.stop or T)

    @jax.jit
    def both(tokens, part):
        out = attend(case, params, tokens, mask=mask, valid=valid)[0]
        return out, attend(case, params, part, mask=mask, start=real.start)[0]

    out, alone = both(tokens, part)
    wild = {n: x.at[:, pads].multiply(7.0) for n, x in tokens.items()}
    assert np.isfinite(out).all()
    close(out[:, real], alone)
    close(out[:, real], both(wild, part)[0][:, real])


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional(name):
    """Early outputs move with late tokens, and the order of the keys does not matter."""
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)
    segments = jnp.asarray([[1] * 5 + [2] * 8] * 2)
    packs = "segment_ids" in case.variant.takes
    order = jax.random.permutation(jax.random.key(3), T)
    full = lambda t, **more: attend(case, params, t, mask=Full(), **more)[0]

    @jax.jit
    def everything(tokens):
        out = {"whole": full(tokens)}
        q, k, v = tokens["q"], tokens["k"], tokens["v"]
        if case.shuffles:
            plain = lambda k, v: case.variant.attend(params, q, k, v, mask=Full())[0]
            out |= {"plain": plain(k, v), "shuffled": plain(k[:, order], v[:, order])}
        if packs:
            parts = full(cut(tokens, 0, 5)), full(cut(tokens, 5, T), start=5)
            out["parts"] = jnp.concatenate(parts, axis=1)
            out["packed"] = full(tokens, segment_ids=segments)
        return out

    out = everything(tokens)
    late = everything({n: x.at[:, -1].add(1.0) for n, x in tokens.items()})
    assert (np.abs(late["whole"] - out["whole"])[:, 0] > 1e-5).any()
    if packs:
        close(out["packed"], out["parts"])
    if case.shuffles:
        close(out["shuffled"], out["plain"])


@pytest.mark.parametrize("name", takes("prefix"))
def test_a_prefix_is_keys_before_all_others(name):
    """In training and when it generates; a row may have none."""
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)
    more = tokens_of(5, length=3, batch=1)
    on = jnp.asarray([[1, 1, 1], [0, 0, 0]])
    mask = attention.Causal()
    q, k, v, inputs = layer(tokens)
    join = lambda a, b: jnp.concatenate([jnp.broadcast_to(a, (2, *a.shape[1:])), b], axis=1)
    zeros = jnp.zeros((2, 3, *q.shape[2:]))
    k, v, q = join(more["k"], k), join(more["v"], v), jnp.concatenate([zeros, q], axis=1)

    @jax.jit
    def both(rows):
        prefix = KeyValuePrefix(more["k"], more["v"], rows)
        out = attend(case, params, tokens, mask=mask, prefix=prefix)[0]
        valid = jnp.concatenate([rows, jnp.ones((2, T))], axis=1)
        joined = case.variant.attend(params, q, k, v, mask=mask, valid=valid, inputs=inputs)[0]
        if not case.variant.generates:
            return out, joined[:, 3:], out
        state = case.variant.init_state(SIZES, 2, 16, jnp.float32, mask)
        places = jnp.broadcast_to(jnp.arange(T), (2, T))
        how = {"mode": "prefill", "state": state, "positions": places, "mask": mask}
        return out, joined[:, 3:], attend(case, params, tokens, prefix=prefix, **how)[0]

    for rows in (jnp.ones((2, 3)), on):
        out, joined, prefilled = both(rows)
        close(out, joined)
        close(prefilled, joined)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_bfloat16(name):
    case, tokens = CASES[name], tokens_of()
    params = params_of(case)

    def loss(params, tokens):
        out, report = attend(case, params, tokens)
        return (out**2).sum() + sum(x.sum() for x in jax.tree.leaves(report))

    gradients = jax.jit(jax.grad(loss, (0, 1)))

    of_params, of_tokens = gradients(params, tokens)
    for path, g in jax.tree_util.tree_leaves_with_path((of_params, of_tokens)):
        assert np.isfinite(g).all(), path
    for path, g in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.abs(g).max() > 0, f"{path} gets no gradient"
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tokens)
    run = jax.jit(lambda p, t: attend(case, p, t)[0])
    out = run(params, low)
    assert out.dtype == jnp.bfloat16
    exact = run(params, jax.tree.map(lambda a: a.astype(jnp.float32), low))
    error = np.linalg.norm(out.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert error < 2e-2


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.linear])
def test_temporaries_grow_linearly(name):
    """Forward and gradient at 4 times the length: 4 times the temporaries, not 16."""
    case = CASES[name]
    variant, params = case.variant, params_of(case)
    if hasattr(variant, "chunk"):
        variant = dataclasses.replace(variant, chunk=64)
    case = dataclasses.replace(case, variant=variant)
    mask = case.mask if name in CAUSAL else Full()

    def temporaries(length):
        tokens = jax.eval_shape(lambda: tokens_of(length=length, batch=1))
        loss = lambda p, t: attend(case, p, t, mask=mask)[0].astype(jnp.float32).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)


def test_errors():
    tokens = tokens_of()
    for name in takes("segment_ids"):
        case = CASES[name]
        if not case.variant.generates:
            continue
        state = case.variant.init_state(SIZES, 2, 16, jnp.float32, case.mask)
        how = {"mode": "decode", "state": state, "positions": jnp.zeros((2, T), jnp.int32)}
        with pytest.raises(ConfigError, match="one sequence per row"):
            attend(case, params_of(case), tokens, segment_ids=jnp.ones((2, T)), **how)
    with pytest.raises(ConfigError, match="LinearAttention takes Causal, Full masks"):
        attend(CASES["Linear-elu1"], {}, tokens, mask=attention.Sliding(3))
    with pytest.raises(ConfigError, match="not defined with dropout"):
        drop = attention.Dropout(0.1, jax.random.key(0))
        attend(CASES["Linear-elu1"], {}, tokens, dropout=drop)
    with pytest.raises(ConfigError, match="nearest: relu, elu1"):
        attention.LinearAttention(feature_map="elu2")
    with pytest.raises(ConfigError, match="add skip=True"):
        attention.Hedgehog(start="zero")
