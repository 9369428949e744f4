"""Flax Linen: layers whose weights may be any leaf, and interception of foreign models."""
