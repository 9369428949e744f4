"""Flax NNX: adaptation of foreign models, trained as functions of a parameter dict."""

from flora_jax.nnx.adapt import adapt as adapt
from flora_jax.nnx.adapt import specs as specs
from flora_jax.nnx.functional import apply as apply
from flora_jax.nnx.functional import functional as functional
from flora_jax.nnx.functional import merge as merge
from flora_jax.nnx.functional import params as params
