"""Problems for block-sparse attention and what its implementations are compared by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.kernels.block_sparse_attention import block_sparse_attention

BLOCKS = {"block_q": 16, "block_k": 8}


def problem(
    queries=32, keys=32, heads=2, key_heads=2, width=8, entries=3, batch=1, dtype="float32", seed=0
):
    """Arguments of the op, with distinct blocks in each row of the table."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, queries, heads, width))
    k, v = rng.normal(size=(2, batch, keys, key_heads, width))
    blocks = -(-keys // BLOCKS["block_k"])
    table = rng.permuted(
        np.tile(np.arange(blocks), (batch, heads, -(-queries // BLOCKS["block_q"]), 1)), axis=-1
    )[..., :entries]
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(table, jnp.int32)


STATIC = ("block_q", "block_k", "scale", "steps")


@functools.partial(jax.jit, static_argnums=4, static_argnames=STATIC)
def run(q, k, v, table, implementation="xla", **kwargs):
    kwargs = BLOCKS | kwargs
    return block_sparse_attention(q, k, v, table, **kwargs, implementation=implementation)


def ratio(x, y):
    """Root mean square of the difference over that of the expected."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.isfinite(x).all()
    return np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-30))


def results(arguments, implementation, **kwargs):
    """(o, lse) and the gradients of a function of both."""
    q, k, v, table = arguments

    def loss(q, k, v):
        o, lse = run(q, k, v, table, implementation, **kwargs)
        weights = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
        return jnp.sum(o.astype(jnp.float32) * weights) + jnp.sum(jnp.sin(lse)), (o, lse)

    grads, outputs = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return outputs, grads


def agree(arguments, implementation="xla", outputs=1e-5, grads=1e-5, **kwargs):
    exact = [x.astype(jnp.float32) for x in arguments[:3]]
    got = results(arguments, implementation, **kwargs)
    expected = results((*exact, arguments[3]), "reference", **kwargs)
    for x, y in zip(got[0], expected[0]):
        assert ratio(x, y) < outputs
    for x, y in zip(got[1], expected[1]):
        assert x.dtype == arguments[0].dtype and ratio(x, y) < grads
