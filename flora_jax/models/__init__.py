"""Models: Linen modules with scanned layers, and the registry that builds them from a config."""

from flora_jax.models.registry import abstract, architectures, build, init, register

__all__ = ["abstract", "architectures", "build", "init", "register"]
