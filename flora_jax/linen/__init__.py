"""Flax Linen: layers whose weights may be any leaf, and interception of foreign models."""

from flora_jax.linen.intercept import intercept as intercept
from flora_jax.linen.specs import specs as specs
