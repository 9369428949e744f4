"""Inside ``jax.shard_map`` kernels must say over which axes their results vary: every kernel,
forward and gradient, traced for devices that are not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrence import features

from flora_jax.kernels import dispatch
from flora_jax.kernels.block_sparse_attention import block_sparse_attention
from flora_jax.kernels.gated_linear_attention import gated_linear_attention
from flora_jax.kernels.hybrid_attention import hybrid_attention
from flora_jax.kernels.low_bit_matmul import low_bit_matmul, quantize
from flora_jax.kernels.sla import SLAConfig, sla
from flora_jax.kernels.window_attention import window_attention

X = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)
"""Queries, keys and values."""


def block_sparse(q, k, v):
    table = jnp.zeros((1, 2, 4, 2), jnp.int32)
    return block_sparse_attention(q, k, v, table, block_q=128, block_k=128)[0]


def sparse_linear(variant):
    proj = {"kernel": jnp.zeros((128, 128), X.dtype), "bias": jnp.zeros(128, X.dtype)}
    return lambda q, k, v: sla(q, k, v, proj, SLAConfig(variant=variant))


def low_bit(q, k, v):
    weight = quantize(jnp.ones((128, 256)), "int8")
    return low_bit_matmul(q + k + v, weight)


OPS = {
    "block_sparse_attention": block_sparse,
    "gated_linear_attention": lambda q, k, v: gated_linear_attention(q, k, v, k)[0],
    "hybrid_attention": lambda q, k, v: hybrid_attention(
        q, k, v, q, k, features=features, window=64
    ),
    "low_bit_matmul": low_bit,
    "sla main": sparse_linear("main"),
    "sla sla1": sparse_linear("sla1"),
    "window_attention": lambda q, k, v: window_attention(q, k, v, window=64)[0],
}
HOPPER = ("block_sparse_attention", "gated_linear_attention", "low_bit_matmul")
CASES = [("tpu", "pallas_tpu", op) for op in OPS] + [("sm90", "mosaic_gpu", op) for op in HOPPER]


@pytest.mark.parametrize(("target", "implementation", "op"), CASES)
def test_kernels_run_under_shard_map(target, implementation, op):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(OPS[op], mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    loss = lambda *args: spread(*args).astype(jnp.float32).sum()
    # The choice is final: nothing else can run in a kernel's place.
    with dispatch.target(target), dispatch.use(implementation):
        grads = jax.eval_shape(jax.grad(loss, (0, 1, 2)), X, X, X)
    assert [x.shape for x in grads] == [X.shape] * 3
