"""Pallas kernels, installed as ``flora_jax.kernels``; each op is a folder, see docs/design.md."""
