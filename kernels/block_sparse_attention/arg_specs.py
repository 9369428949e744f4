"""Shapes that the benchmark measures and the ahead-of-time compiles must take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax.kernels.costs import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call; ``entries`` of the ``ceil(length / block_k)`` key blocks are listed per row."""

    name: str
    batch: int = 2
    length: int
    heads: int = 16
    key_heads: int = 16
    width: int = 128
    block_q: int = 128
    block_k: int = 64
    dtype: str = "bfloat16"
    density: float = 0.05
    small: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """Query blocks and key blocks."""
        return -(-self.length // self.block_q), -(-self.length // self.block_k)

    @property
    def entries(self) -> int:
        """Key blocks listed per query block."""
        return max(1, int(self.density * self.blocks[1]))

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract ``(q, k, v, table)``."""
        dtype = jnp.dtype(self.dtype)
        q = (self.batch, self.length, self.heads, self.width)
        k = (self.batch, self.length, self.key_heads, self.width)
        table = (self.batch, self.heads, self.blocks[0], self.entries)
        arrays = [jax.ShapeDtypeStruct(x, dtype) for x in (q, k, k)]
        return *arrays, jax.ShapeDtypeStruct(table, jnp.int32)

    def draw(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """Normal q, k, v; a table of distinct blocks, each row its own."""
        *arrays, table = self.arguments()
        keys = jax.random.split(key, 4)
        arrays = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, arrays)]
        order = jax.random.uniform(keys[3], (*table.shape[:3], self.blocks[1]))
        return *arrays, jnp.sort(jax.lax.top_k(order, self.entries)[1], axis=-1)

    def work(self, backward: bool = False) -> Work:
        """Two products per listed pair forward, five more in the gradient; arrays moved once."""
        pairs = self.batch * self.heads * self.length * self.entries * self.block_k
        q, k, v, table = self.arguments()
        size = lambda x: x.size * x.dtype.itemsize
        rows = 4 * self.batch * self.heads * self.length
        forward = 2 * size(q) + size(k) + size(v) + size(table) + rows
        # The gradient reads q, k, v, o, do and the log sums again and writes dq, dk and dv.
        bytes = forward + (4 * size(q) + 4 * size(k) + size(table) + rows if backward else 0)
        products = 7 if backward else 2
        return Work(flops=2 * products * pairs * self.width, bytes=bytes, unit=self.dtype)


LENGTHS = (2048, 4096, 8192, 16384, 32760)
BENCH = tuple(Spec(name=f"B2 H16 L{n} D128, 95 % skipped", length=n) for n in LENGTHS)
"""32760 tokens are a video of Wan2.1-1.3B, the length that SLA's authors measure."""
SMALL = Spec(
    name="B1 H2 L2048 D64, 95 % skipped",
    batch=1,
    heads=2,
    key_heads=2,
    width=64,
    length=2048,
    dtype="float32",
    small=True,
)
SPECS = (*BENCH, SMALL)
