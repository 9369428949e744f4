"""InLine, LiT and ConvShareViT: explicit forms, their cards' checks, the papers' counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.attention import Causal, ConvShare, Full, InLine, Inputs, LiT, Sizes
from flora_jax.attention.grid import window_sums
from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten, unflatten
from flora_jax.models import DiT, DiTConfig, ViT, ViTConfig, registry

SIZES = Sizes(heads=4, kv_heads=2, dim=8, width=32)
GRID = (3, 4)  # not square; one token before the patches
T = 13


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, K, V = draw(0, 2, T, 4, 8), draw(1, 2, T, 2, 8), draw(2, 2, T, 2, 8)
X = draw(3, 2, T, 32)
FULL = Full()
IMAGES = draw(5, 2, 4, 6, 1)


def attend(variant, q=Q, k=K, v=V, params=None, mask=FULL, **call):
    inputs = Inputs(x=jnp.asarray(X), q=q, k=k, grid=GRID)
    run = lambda p, q, k, v: variant.attend(p, q, k, v, mask=mask, inputs=inputs, **call)[0]
    return np.asarray(jax.jit(run)(params or {}, *map(jnp.asarray, (q, k, v))))


def count(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.abstract(model)))


def inline_weights(fq, fk):
    """``[B, N, T, T]``, by the definition."""
    fk = np.repeat(fk, 2, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", fq, fk) * 8**-0.5 / T
    return scores - scores.mean(axis=-1, keepdims=True) + 1 / T


@pytest.mark.parametrize("name, phi", [("identity", lambda x: x), ("exp", np.exp)])
def test_inline_is_its_square_form_whose_rows_sum_to_one(name, phi):
    weights = inline_weights(phi(Q), phi(K))
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert weights.min() < 0
    expected = np.einsum("bnts,bsnh->btnh", weights, np.repeat(V, 2, axis=2))
    out = attend(InLine(feature_map=name, residual=False))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_inline_tells_scaled_queries_apart_where_relu_linear_attention_does_not():
    linear, inline = LiT(window=0, eps=0.0), InLine(feature_map="relu", residual=False)
    np.testing.assert_allclose(attend(linear), attend(linear, q=3 * Q), atol=1e-5)
    control = InLine(feature_map="relu", residual=False, division=True, eps=0.0)
    np.testing.assert_allclose(attend(control), attend(linear), atol=1e-5)
    assert np.abs(attend(inline) - attend(inline, q=3 * Q)).max() > 0.1


def test_inline_is_affine_in_the_query_and_the_mean_of_values_for_equal_keys():
    pure, other = InLine(residual=False), draw(4, *Q.shape)
    mixed = attend(pure, q=0.3 * Q + 0.7 * other)
    np.testing.assert_allclose(mixed, 0.3 * attend(pure) + 0.7 * attend(pure, q=other), atol=1e-5)
    same = np.broadcast_to(K[:, :1], K.shape)
    mean = np.repeat(V.mean(axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(attend(pure, k=same), np.broadcast_to(mean, Q.shape), atol=1e-5)


def test_inline_causal_is_the_square_form_of_each_prefix():
    out = attend(InLine(residual=False, chunk=5), mask=Causal())
    for last in (0, 6, 12):
        seen = slice(0, last + 1)
        whole = attend(InLine(residual=False), q=Q[:, seen], k=K[:, seen], v=V[:, seen])
        np.testing.assert_allclose(out[:, last], whole[:, last], atol=1e-5)


def test_inline_padding_is_not_counted():
    valid = jnp.asarray([[1] * 9 + [0] * 4] * 2)
    out = attend(InLine(residual=False), valid=valid)
    short = attend(InLine(residual=False), k=K[:, :9], v=V[:, :9], q=Q[:, :9])
    np.testing.assert_allclose(out[:, :9], short, atol=1e-5)


def test_inline_residual_is_a_window_of_each_image():
    """Grouped layers by hand; torch's order of channels; the class token takes no part."""
    params = InLine().init(jax.random.key(0), SIZES, jnp.float32)
    assert sum(a.size for a in jax.tree.leaves(params)) == 10 * 32**2 // 4 + 10 * 32
    weights = {name: np.asarray(p["kernel"])[0, 0] for name, p in params.items()}

    def grouped(name, x):
        groups = zip(np.split(x, 4, axis=1), np.split(weights[name], 4, axis=1))
        return np.concatenate([a @ b for a, b in groups], axis=1) + params[name]["bias"]

    inner = np.asarray(jax.nn.gelu(grouped("residual_in", X.mean(axis=1)), approximate=False))
    kernel = grouped("residual_out", inner).reshape(2, 32, 3, 3)
    image = np.repeat(V, 2, axis=2)[:, 1:].reshape(2, 3, 4, 32)
    image = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    local = np.zeros((2, 3, 4, 32), np.float32)
    for i in range(3):
        for j in range(4):
            window = image[:, i : i + 3, j : j + 3]
            local[:, i, j] = np.einsum("bcrs,brsc->bc", kernel, window)
    change = attend(InLine(), params=params) - attend(InLine(residual=False))
    np.testing.assert_allclose(change[:, 1:].reshape(2, 3, 4, 32), local, atol=1e-5)
    assert not np.any(change[:, 0])
    nothing = {**params, "residual_out": jax.tree.map(jnp.zeros_like, params["residual_out"])}
    np.testing.assert_array_equal(
        attend(InLine(), params=nothing), attend(InLine(residual=False))
    )


@pytest.mark.parametrize(
    ("width", "heads", "size", "parameters"),
    [(192, 6, 224, 6_477_736), (320, 10, 288, 16_734_760), (384, 12, 448, 23_797_096)],
    ids="TSB",
)
def test_counts_of_inline_deit(width, heads, size, parameters):
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        image_size=size,
        intermediate_size=4 * width,
        num_labels=1000,
        attention=InLine(),
    )
    assert count(ViT(config)) == parameters


def test_inline_refuses_what_it_is_not_defined_for():
    with pytest.raises(ConfigError, match="takes Full masks"):
        attend(InLine(), mask=Causal())
    with pytest.raises(ConfigError, match="reads the layer's x"):
        InLine().attend({}, Q, K, V, mask=Full())
    with pytest.raises(ConfigError, match="nearest: leaky_relu"):
        InLine(feature_map="leakyrelu")
    with pytest.raises(ConfigError, match="divides by sums of identity"):
        InLine(division=True)


def test_lit_is_relu_linear_attention_and_a_convolution():
    params = LiT().init(jax.random.key(0), SIZES, jnp.float32)
    fq, fk = np.maximum(Q, 0), np.repeat(np.maximum(K, 0), 2, axis=2)
    weights = np.einsum("btnh,bsnh->bnts", fq, fk)
    weights /= weights.sum(axis=-1, keepdims=True) + 1e-6
    plain = np.einsum("bnts,bsnh->btnh", weights, np.repeat(V, 2, axis=2))
    np.testing.assert_allclose(attend(LiT(window=0)), plain, atol=1e-5)
    nothing = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(attend(LiT(), params=nothing), plain, atol=1e-5)
    values = np.repeat(V, 2, axis=2)[:, 1:].reshape(2, 3, 4, 32)
    kernel = jnp.broadcast_to(params["depthwise"]["kernel"][:, :, 0], (2, 5, 5, 32))
    local = window_sums(jnp.asarray(values), kernel) + params["depthwise"]["bias"]
    # Queries whose features are all zero have the convolution alone.
    out = attend(LiT(), q=-np.abs(Q), params=params)
    np.testing.assert_allclose(out[:, 1:].reshape(local.shape), local, atol=1e-5)
    assert not np.any(out[:, 0])
    with pytest.raises(ConfigError, match="LiT.window=4 must be odd"):
        LiT(window=4)


def test_lit_counts():
    """25 C + C a layer, and as many with few heads as with many."""
    dit = lambda **changes: count(DiT(DiTConfig.tiny(hidden_size=48, **changes)))
    many, few = (dit(attention=LiT(), num_attention_heads=n) for n in (6, 2))
    assert many == few == dit() + 4 * (25 + 1) * 48


SHARES = {
    "dense": None,
    "valid": ConvShare(side=8, window=8),
    "same": ConvShare(side=8, window=3, padding="same"),
}


def test_conv_share_whole_kernels_are_a_dense_layer():
    """And so a ViT of them is the ViT of dense layers, its kernels reshaped."""
    images = jnp.asarray(draw(5, 2, 8, 8, 1))
    config = {"num_hidden_layers": 1, "intermediate_size": 128}
    dense = ViT(ViTConfig.tiny(**config))
    shared = ViT(ViTConfig.tiny(**config, projection=SHARES["valid"]))
    rng = np.random.default_rng(0)
    fill = lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32)
    params = jax.tree.map(fill, registry.abstract(dense))
    shapes = registry.abstract(shared)
    changed = [
        path
        for (path, old), new in zip(flatten(params).items(), flatten(shapes).values())
        if old.shape != new.shape
    ]
    assert len(changed) == 6 and all(p.startswith("layers/") for p in changed)
    same = jax.tree.map(lambda leaf, shape: leaf.reshape(shape.shape), params, shapes)
    out = jax.jit(shared.apply)({"params": same}, images)
    np.testing.assert_allclose(out, jax.jit(dense.apply)({"params": params}, images), atol=1e-4)


def test_conv_share_counts():
    """window^2 numbers a projection in place of C^2; the MLP has four maps a token."""
    kernels = {}
    for name, how in SHARES.items():
        config = ViTConfig.tiny(intermediate_size=256, num_hidden_layers=1, projection=how)
        shapes = flatten(registry.abstract(ViT(config)))
        parts = ("attention/attention/key", "attention/output/dense", "mlp/fc1")
        kernels[name] = tuple(math.prod(shapes[f"layers/{p}/kernel"].shape) for p in parts)
    assert kernels["dense"] == kernels["valid"] == (64**2, 64**2, 4 * 64**2)
    assert kernels["same"] == (9, 9, 4 * 9)


def test_conv_share_same_padding_follows_a_shift():
    how, kernel = ConvShare(side=6, window=3, padding="same"), draw(6, 3, 3, 1, 1)
    token = np.zeros((2, 6, 6), np.float32)
    token[:, 1:4, 1:4] = draw(7, 2, 3, 3)
    moved = np.roll(token, (1, 1), axis=(1, 2))
    run = lambda t: np.asarray(how.apply(jnp.asarray(t).reshape(2, 36), kernel)).reshape(2, 6, 6)
    np.testing.assert_allclose(run(moved)[:, 1:, 1:], run(token)[:, :-1, :-1], atol=1e-6)


def test_conv_share_small_kernels_give_several_numbers_each():
    """A doubly Toeplitz matrix: what a kernel gives is a correlation over the token's map."""
    how, kernel, token = ConvShare(side=4, window=3), draw(8, 3, 3, 1, 2), draw(9, 16)
    out = np.asarray(how.apply(jnp.asarray(token), kernel)).reshape(2, 2, 2)
    image = token.reshape(4, 4)
    for i in range(2):
        for j in range(2):
            expected = np.einsum("rs,rsm->m", image[i : i + 3, j : j + 3], kernel[:, :, 0])
            np.testing.assert_allclose(out[i, j], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvShare(side=4, window=5), "window=5 must be between 1 and side=4"),
        (lambda: ConvShare(side=4, window=3, padding="sam"), "'sam'.*same"),
        (lambda: ConvShare(side=8, window=3).kernel_shape(60, 64), "do not divide 60 inputs"),
        (lambda: ConvShare(side=8, window=3).kernel_shape(64, 64), "36 numbers do not divide 64"),
        (lambda: ViTConfig.tiny(projection=SHARES["same"]).to_hf(), "no ViT with projections"),
    ],
)
def test_wrong_projections_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize("variant", [InLine(), LiT(window=3)], ids=["InLine", "LiT"])
def test_dit_takes_the_variants_and_starts_at_zero(variant):
    """On a grid that is not square; adaLN-zero: gains and last layer zero make a zero output."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DiT(DiTConfig.tiny(**small, intermediate_size=16, attention=variant))
    shapes = flatten(registry.abstract(model))
    flat = {path: draw(i, *a.shape) for i, (path, a) in enumerate(shapes.items())}
    zero = {p: 0 * a if "modulation" in p or "linear" in p else a for p, a in flat.items()}
    run = jax.jit(lambda flat: model.apply({"params": unflatten(flat)}, IMAGES, jnp.zeros(2)))
    assert not np.any(run(zero))
    out = run(flat)
    assert np.isfinite(out).all() and np.any(out)
