"""Merging task vectors: pure functions of arrays, and of ``{path: array}`` dicts."""

from flora_jax.merging.sparse import dare as dare
from flora_jax.merging.sparse import linear as linear
from flora_jax.merging.sparse import magnitude_prune as magnitude_prune
from flora_jax.merging.sparse import ties as ties
