"""What the tests of gated linear attention share: the metric and the comparison."""

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.kernels.gated_linear_attention import gated_linear_attention

FLOAT32, BFLOAT16, BFLOAT16_GRADIENT = 1e-5, 5e-3, 8e-3
NAMES = ("q", "k", "v", "log_decay", "initial_state")


def ratio(ours, theirs):
    """RMS of the difference over RMS of the reference."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.sqrt(np.mean((ours - theirs) ** 2)) / max(np.sqrt(np.mean(theirs**2)), 1e-30)


def assert_close(ours, theirs, limit, what=""):
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs))
    for (path, a), b in pairs:
        where = f"{what} {jax.tree_util.keystr(path)}"
        assert a.shape == b.shape and a.dtype == b.dtype, where
        assert np.isfinite(np.asarray(a, np.float32)).all(), where
        assert ratio(a, b) < limit, f"{where}: {ratio(a, b):.2e}"


def call(args, **options):
    args = dict(args)
    return gated_linear_attention(
        args.pop("q"), args.pop("k"), args.pop("v"), args.pop("log_decay"), **args, **options
    )


def with_gradients(args, weights, **options):
    """Output, state and the gradients by every array, of a loss that weighs both outputs."""

    def loss(args):
        out, state = call(args, **options)
        terms = (jnp.sum(x.astype(jnp.float32) * w) for x, w in zip((out, state), weights))
        return sum(terms), (out, state)

    moved = {name: args[name] for name in NAMES if args.get(name) is not None}
    fixed = {name: x for name, x in args.items() if name not in moved}
    grad = jax.value_and_grad(lambda moved: loss(moved | fixed), has_aux=True)
    (_, outputs), grads = jax.jit(grad)(moved)
    return outputs, grads


def weights_of(args):
    out = jax.eval_shape(lambda a: call(a), args)
    return [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(out)]


def features(q, k):
    """Queries, keys and gates of a layer's queries and keys, none of them zero for zeros."""
    return jax.nn.softmax(q), jax.nn.softmax(k), jax.nn.log_sigmoid(k) / 4


def check(args, limit=FLOAT32, gradient_limit=None, features=None, **options):
    weights = weights_of(args)
    # The reference computes from the same numbers in float32.
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if is_float(x) else x, args)
    ours, ours_grads = with_gradients(args, weights, features=features, **options)
    wanted = {"features": features, "implementation": "reference"}
    theirs, their_grads = with_gradients(exact, weights, **wanted)
    cast = lambda tree, like: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
    assert_close(ours, cast(theirs, ours), limit, "output")
    theirs = cast(their_grads, ours_grads)
    assert_close(ours_grads, theirs, gradient_limit or limit, "gradient")
