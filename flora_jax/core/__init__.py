"""The core: paths, kernel specs, operators, weight leaves and the one contraction dispatch.

Imports jax, numpy, einops and the standard library only.
"""
