"""Softmax attention over the key blocks that a table lists for each block of queries."""

from flora_jax.kernels.block_sparse_attention.api import (
    block_sparse_attention as block_sparse_attention,
)
from flora_jax.kernels.block_sparse_attention.layout import Steps as Steps
