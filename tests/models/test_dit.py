"""DiT: sizes of the paper's models, a zero start, names, positions, scan and remat."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.core.paths import flatten
from flora_jax.core.spec import infer
from flora_jax.models import DiT, DiTConfig, registry
from flora_jax.models.dit import grid_positions

IMAGES = jax.random.normal(jax.random.key(5), (3, 8, 8, 1))
TIME, LABELS = jnp.asarray([0.0, 0.4, 0.99]), jnp.asarray([1, 9, 10])
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "frequencies": 8}
SMALL |= {"intermediate_size": 24}


@pytest.fixture(scope="module")
def tiny():
    """A network none of whose weights is zero; made with NumPy, so that nothing compiles."""
    model, rng = DiT(DiTConfig.tiny(**SMALL)), np.random.default_rng(0)
    fill = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return model, jax.tree.map(fill, registry.abstract(model))


apply = jax.jit(
    lambda model, params, *args, **options: model.apply({"params": params}, *args, **options),
    static_argnums=0,
    static_argnames="output",
)


def test_count_of_the_papers_largest():
    """DiT-XL/2 at 256x256; DiT's own count holds the fixed positions of its 16x16 tokens too."""
    shapes = registry.abstract(DiT(DiTConfig()))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == 675_129_632 - 256 * 1152


def test_a_fresh_network_is_zero_and_its_blocks_the_identity():
    model = DiT(DiTConfig.tiny(**SMALL))
    params = jax.jit(registry.init, static_argnums=0)(model, jax.random.key(0))
    call = lambda output: apply(model, params, IMAGES, TIME, LABELS, output=output)
    assert not np.any(call("prediction"))
    layers = call("layers")
    np.testing.assert_array_equal(layers[0], layers[-1])
    assert np.abs(layers[0]).max() > 0


def test_paths_and_specs(tiny):
    shapes = {path: leaf.shape for path, leaf in flatten(tiny[1]).items()}
    assert shapes["x_embedder/projection/kernel"] == (2, 2, 1, 16)
    assert shapes["y_embedder/embedding"] == (11, 16)
    assert shapes["layers/attention/attention/query/kernel"] == (2, 16, 16)
    assert shapes["layers/modulation/kernel"] == (2, 16, 96)
    assert shapes["final_layer/linear/kernel"] == (16, 2 * 2 * 2)
    kinds = {path: infer(path, shape).kind for path, shape in shapes.items()}
    assert kinds["x_embedder/projection/kernel"] == "conv"
    assert kinds["y_embedder/embedding"] == "embedding"


def test_a_patch_is_written_where_it_was_read(tiny):
    """With blocks that do nothing and one lit pixel, only its patch's output moves."""
    model, params = tiny
    still = jax.tree.map(jnp.zeros_like, params["layers"])
    call = lambda images: apply(model, {**params, "layers": still}, images, TIME, LABELS)
    moved = jnp.abs(call(IMAGES.at[:, 3, 4].add(1.0)) - call(IMAGES)) > 0
    rows, columns = np.nonzero(np.asarray(moved).any(axis=(0, 3)))
    assert {*rows} == {2, 3} and {*columns} == {4, 5}


def test_positions_are_those_of_the_official_code():
    """Columns first, sines first, frequencies 10000^(-m / (D / 4))."""
    table = np.asarray(grid_positions(2, 3, 8))
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angles = [at * w for at in (column, row) for w in (1.0, 0.01)]
        halves = (angles[:2], angles[2:])
        expected = [f(a) for half in halves for f in (np.sin, np.cos) for a in half]
        np.testing.assert_allclose(table[place], expected, atol=1e-6)


def test_time_and_class_matter_and_ten_means_none(tiny):
    model, params = tiny
    call = lambda time, labels: apply(model, params, IMAGES, time, labels)
    out = call(TIME, LABELS)
    assert not np.allclose(out, call(TIME + 0.001, LABELS), atol=1e-5)
    free = call(TIME, jnp.full(3, 10))
    np.testing.assert_array_equal(out[2], free[2])
    assert not np.allclose(out[1], free[1], atol=1e-5)
    np.testing.assert_allclose(apply(model, params, IMAGES, TIME), free, atol=1e-5)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "dots"}])
def test_scan_and_remat_change_nothing(tiny, changes):
    model, params = tiny
    other = model.clone(config=dataclasses.replace(model.config, **changes))
    tree = params
    if "scan_layers" in changes:
        layers = params["layers"]
        each = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], layers) for i in range(2)}
        tree = {k: v for k, v in params.items() if k != "layers"} | each
    out = apply(other, tree, IMAGES, TIME, LABELS)
    plain = apply(model, params, IMAGES, TIME, LABELS)
    np.testing.assert_allclose(out, plain, atol=1e-5, rtol=1e-5)


def test_bfloat16_activations(tiny):
    model, params = tiny
    low = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    out = apply(low, params, IMAGES, TIME, LABELS)
    assert out.dtype == jnp.bfloat16
    plain = apply(model, params, IMAGES, TIME, LABELS)
    assert np.abs(np.asarray(out, np.float32) - plain).max() < 0.1 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiTConfig.tiny(hidden_size=66, num_attention_heads=2), "hidden_size=66"),
        (lambda: DiTConfig.tiny(num_attention_heads=3), "num_attention_heads=3"),
        (lambda: DiTConfig.tiny(remat="dot"), "'dot'.*dots"),
    ],
)
def test_wrong_configs_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_wrong_inputs_are_named(tiny):
    model, params = tiny
    with pytest.raises(ConfigError, match=r"patch_size=2 does not divide images of \(9, 8\)"):
        model.apply({"params": params}, jnp.ones((1, 9, 8, 1)), TIME[:1])
    free = DiT(DiTConfig.tiny(**SMALL, num_classes=0))
    with pytest.raises(ConfigError, match="labels need num_classes"):
        free.init(jax.random.key(0), IMAGES, TIME, LABELS)
