"""Named shapes that tests, ahead-of-time compiles and benchmarks share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call of :func:`window_attention`; ``marked``: with segments and padding."""

    batch: int = 1
    length: int
    heads: int
    key_heads: int
    dim: int
    window: int
    dtype: str = "float32"
    marked: bool = False

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract ``q, k, v``."""
        of = lambda heads: jax.ShapeDtypeStruct(
            (self.batch, self.length, heads, self.dim), jnp.dtype(self.dtype)
        )
        return of(self.heads), of(self.key_heads), of(self.key_heads)

    def draw(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """Normal ``q, k, v``; when marked also ``valid`` (4 of 5 keys) and sorted segments, some of
        them shared."""
        keys = jax.random.split(key, 5)
        drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, self.arguments())]
        if not self.marked:
            return tuple(drawn)
        tokens = self.batch, self.length
        segments = jnp.sort(jax.random.randint(keys[4], tokens, -1, 3), axis=1)
        return *drawn, jax.random.bernoulli(keys[3], 0.8, tokens), segments

    def work(self, backward: bool = False) -> Work:
        """Two products per pair forward, five in the gradient; arrays moved once."""
        pairs = self.batch * self.heads * self.length * min(self.window, self.length)
        q, k, _ = (x.size * x.dtype.itemsize for x in self.arguments())
        flops = 2 * (5 if backward else 2) * pairs * self.dim
        return Work(flops=flops, bytes=3 * q + 4 * k if backward else 2 * (q + k), unit=self.dtype)


BENCH = {
    f"B=2 L={length} N=16 K={key_heads} D=128 w={window} bf16": Spec(
        batch=2,
        length=length,
        heads=16,
        key_heads=key_heads,
        dim=128,
        window=window,
        dtype="bfloat16",
    )
    for length in (4096, 16384)
    for key_heads, window in ((16, 64), (4, 64), (4, 512))
}
SMOLLM2 = {
    f"B=1 L={length} N=9 K=3 D=64 w=64 float32": Spec(
        length=length, heads=9, key_heads=3, dim=64, window=64
    )
    for length in (1024, 4096)
}
"""One layer of SmolLM2-135M as Liger."""
