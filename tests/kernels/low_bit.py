"""Low-bit weights for the tests of their products, and what numpy alone makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.kernels.low_bit_matmul import Rows, quantize

RNG = np.random.default_rng(0)
FORMATS = [
    ("int4", 64, True),
    ("int4", 64, False),
    ("int4", None, False),
    ("int4", "tensor", True),
    ("int8", 128, False),
    ("int8", None, True),
    ("float8_e4m3fn", 64, True),
    ("float8_e4m3fn", "tensor", True),
]


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape, np.float32)).astype(dtype)


rounded = jax.jit(quantize, static_argnums=1, static_argnames=("group", "symmetric", "tile"))


def weight(format="int4", group=64, symmetric=True, k=256, n=24):
    return rounded(normal(k, n), format, group=group, symmetric=symmetric)


def exact(w, scaled=True):
    """float64 ``[K, N]`` (integers without scales), from numpy alone."""
    k, n = w.shape
    codes = np.asarray(w.codes().astype(jnp.float32), np.float64).reshape(w.groups, w.group, n)
    if w.zero is not None:
        codes = codes - np.asarray(w.zero, np.float64)[:, None, :]
    if scaled:
        codes = codes * np.asarray(w.scale, np.float64)[:, None, :]
    return codes.reshape(k, n)


def codes_of(format, k=256, n=24):
    low, high = (-8, 8) if format == "int4" else (-128, 128)
    return jnp.asarray(RNG.integers(low, high, (k, n)), jnp.int8)


def rows_of(spec):
    """What the op gives an implementation for a Spec, abstract."""
    if spec.x_format is None:
        return spec.x()
    scale = jax.ShapeDtypeStruct((spec.m, 1), jnp.float32)
    return Rows(values=jax.ShapeDtypeStruct((spec.m, spec.k), spec.x_format), scale=scale)
