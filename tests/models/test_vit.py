"""ViT: the cubic resize, tokens, LayerScale, stochastic depth, configs, a little training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten
from flora_jax.core.spec import infer
from flora_jax.models import ViT, ViTConfig, registry
from flora_jax.models.resize import cubic_matrix, resize_grid

IMAGES = jax.random.normal(jax.random.key(5), (3, 8, 8, 1))
init = jax.jit(registry.init, static_argnums=0)


@pytest.fixture(scope="module")
def tiny():
    model = ViT(ViTConfig.tiny())
    return model, init(model, jax.random.key(0))


@pytest.mark.parametrize(("source", "target"), [(5, 5), (5, 8), (5, 3), (37, 16), (4, 1), (1, 4)])
def test_cubic_rows_are_affine_weights(source, target):
    matrix = cubic_matrix(source, target)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    # The sampling is symmetric about the middle.
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


def test_cubic_by_hand():
    # Doubling: each new pixel lies a quarter away from an old one; weights of Keys at a = -3/4.
    row = cubic_matrix(8, 16)[7]
    np.testing.assert_allclose(row[2:6], [-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    assert not np.any(row[[0, 1, 6, 7]])


@pytest.mark.interop
@pytest.mark.parametrize("size", [(7, 7), (5, 9), (16, 4), (37, 3)])
def test_resize_is_torch_bicubic(size):
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(9, 9, 4)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(grid).permute(2, 0, 1)[None], size=size, mode="bicubic", align_corners=False
    )
    ours = resize_grid(jnp.asarray(grid), *size)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_paths_and_specs(tiny):
    shapes = {path: leaf.shape for path, leaf in flatten(tiny[1]).items()}
    assert shapes["embeddings/patch_embeddings/projection/kernel"] == (2, 2, 1, 64)
    assert shapes["embeddings/position_embeddings"] == (1, 17, 64)
    assert shapes["layers/attention/attention/query/kernel"] == (2, 64, 64)
    assert shapes["layers/mlp/fc1/kernel"] == (2, 64, 128)
    kinds = {path: infer(path, shape).kind for path, shape in shapes.items()}
    assert kinds["embeddings/patch_embeddings/projection/kernel"] == "conv"
    assert kinds["embeddings/position_embeddings"] == "vector"
    dense = {path for path, kind in kinds.items() if kind == "dense"}
    assert dense == {p for p in shapes if p.endswith("kernel")} - {
        "embeddings/patch_embeddings/projection/kernel"
    }


def test_patches_are_read_row_by_row(tiny):
    """A patch's token is its pixels times the kernel, plus its position."""
    model, params = tiny
    token = model.apply({"params": params}, IMAGES, output="layers")[0]
    table = params["embeddings"]
    kernel = table["patch_embeddings"]["projection"]["kernel"]
    patch = IMAGES[1, 2:4, 6:8].reshape(-1) @ kernel.reshape(-1, 64)
    row, column = 1, 3
    place = 1 + 4 * row + column
    expected = patch + table["position_embeddings"][0, place]
    np.testing.assert_allclose(token[1, place], expected, atol=1e-5)
    cls = table["cls_token"][0, 0] + table["position_embeddings"][0, 0]
    np.testing.assert_allclose(token[1, 0], cls, atol=1e-6)


def test_outputs_agree(tiny):
    model, params = tiny
    names = ("hidden", "layers", "cls", "mean", "cls_mean", "logits")
    apply = lambda name: model.apply({"params": params}, IMAGES, output=name)
    call = jax.jit(lambda: {name: apply(name) for name in names})().get
    hidden = call("hidden")
    assert call("layers").shape == (3, 3, 17, 64)
    np.testing.assert_array_equal(call("cls"), hidden[:, 0])
    np.testing.assert_allclose(call("mean"), hidden[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_array_equal(
        call("cls_mean"), jnp.concatenate([call("cls"), call("mean")], -1)
    )
    head = params["classifier"]
    np.testing.assert_allclose(
        call("logits"), call("cls") @ head["kernel"] + head["bias"], atol=1e-5
    )


def test_mask_token_hides_a_patch():
    model = ViT(ViTConfig.tiny(use_mask_token=True, num_labels=0))
    params = init(model, jax.random.key(0))
    masked = jnp.zeros((3, 16), bool).at[:, 0].set(True)
    other = IMAGES.at[:, :2, :2].set(9.0)
    call = jax.jit(lambda images, masked: model.apply({"params": params}, images, masked))
    np.testing.assert_array_equal(call(IMAGES, masked), call(other, masked))
    assert not np.allclose(call(IMAGES, None), call(other, None))


def test_zero_layerscale_is_the_identity():
    model = ViT(ViTConfig.tiny(layerscale_value=0.0))
    params = init(model, jax.random.key(0))
    layers = model.apply({"params": params}, IMAGES, output="layers")
    np.testing.assert_array_equal(layers[0], layers[-1])


def test_stochastic_depth_drops_whole_examples():
    config = ViTConfig.tiny(num_hidden_layers=1, drop_path_rate=0.5)
    model = ViT(config)
    params = init(model, jax.random.key(0))
    images = jnp.broadcast_to(IMAGES[:1], (64, 8, 8, 1))
    out = model.apply(
        {"params": params},
        images,
        output="layers",
        train=True,
        rngs={"dropout": jax.random.key(1)},
    )
    change = np.abs(np.asarray(out[1] - out[0])).max(axis=(1, 2))
    # Both branches of a block are dropped for about a quarter of the examples.
    assert 6 <= (change == 0).sum() <= 28
    assert len(np.unique(np.round(change, 4))) == 4


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "dots_no_batch"}])
def test_scan_and_remat_change_nothing(tiny, changes):
    model, params = tiny
    other = model.clone(config=dataclasses.replace(model.config, **changes))
    if not changes.get("scan_layers", True):
        layers = params["layers"]
        rest = {k: v for k, v in params.items() if k != "layers"}
        each = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], layers) for i in range(2)}
        out = other.apply({"params": rest | each}, IMAGES)
    else:
        out = other.apply({"params": params}, IMAGES)
    np.testing.assert_allclose(out, model.apply({"params": params}, IMAGES), atol=1e-5)


def test_config_round_trip():
    plain = {"initializer_range": 0.02, "layer_norm_eps": 1e-12}
    for config in (
        ViTConfig.tiny(**plain),
        ViTConfig.tiny(**plain, num_labels=0, use_pooler=True),
        ViTConfig.tiny(**plain, num_labels=0),
        ViTConfig.dinov2_small(),
        ViTConfig.dinov2_small(num_labels=4, pooling="cls"),
        ViTConfig.dinov2_small(use_swiglu_ffn=True, intermediate_size=2048),
    ):
        assert ViTConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViTConfig.tiny(patch_size=3), "patch_size=3.*image_size=8"),
        (lambda: ViTConfig.tiny(pooling="clss"), "'clss'.*cls"),
        (lambda: ViTConfig.tiny(pooling="pooler"), "use_pooler"),
        (lambda: ViTConfig.tiny(use_mask_token=True).to_hf(), "mask token"),
        (lambda: ViTConfig.from_hf({"model_type": "swin"}), "swin"),
        (lambda: ViTConfig.from_hf({"model_type": "vit", "image_size": [8, 16]}), "not square"),
    ],
)
def test_wrong_configs_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_wrong_images_are_named(tiny):
    model, params = tiny
    with pytest.raises(ConfigError, match=r"patch_size=2 does not divide images of \(9, 8\)"):
        model.apply({"params": params}, jnp.ones((1, 9, 8, 1)))
    with pytest.raises(ConfigError, match=r"not \[B,H,W,1\]"):
        model.apply({"params": params}, jnp.ones((1, 8, 8, 3)))
    with pytest.raises(ConfigError, match="use_mask_token"):
        model.apply({"params": params}, IMAGES, jnp.ones((3, 16), bool))


def test_learns_digits(tiny):
    datasets = pytest.importorskip("sklearn.datasets")
    model, params = tiny
    x, y = datasets.load_digits(return_X_y=True)
    x = jnp.asarray(x.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)[:256]
    y = jnp.asarray(y)[:256]
    optimizer = optax.adam(2e-3)

    def loss(params):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grad, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=30)[1]

    losses = train(params)
    assert losses[0] > 2
    assert losses[-1] < 1
