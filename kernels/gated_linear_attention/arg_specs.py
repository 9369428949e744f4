"""Named shapes that tests, ahead-of-time compiles and benchmarks share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

GATES = ("channel", "head", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Arguments of :func:`gated_linear_attention`.

    Args:
      heads: query heads N.
      kv_heads: key heads H.
      gate: one decay per key ``channel``, one per ``head`` or ``none``.
      state: with an initial state.
    """

    batch: int = 1
    length: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: str = "float32"
    gate: str = "channel"
    state: bool = False

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Abstract arguments by name."""
        keys = (self.batch, self.length, self.kv_heads)
        decay = {"channel": (*keys, self.dim), "head": keys, "none": None}[self.gate]
        of = lambda shape, dtype: None if shape is None else jax.ShapeDtypeStruct(shape, dtype)
        state = (self.batch, self.kv_heads, self.dim, self.value_dim) if self.state else None
        return {
            "q": of((self.batch, self.length, self.heads, self.dim), self.dtype),
            "k": of((*keys, self.dim), self.dtype),
            "v": of((*keys, self.value_dim), self.dtype),
            "log_decay": of(decay, jnp.float32),
            "initial_state": of(state, jnp.float32),
        }

    def draw(self, key: jax.Array, sharpness: float = 1.0) -> dict[str, jax.Array | None]:
        """Normal q, k, v and state; ``logsigmoid(N(0, 1)) / 16 * sharpness`` for the decay."""

        def one(name: str, of: jax.ShapeDtypeStruct | None, key: jax.Array) -> jax.Array | None:
            if of is None:
                return None
            x = jax.random.normal(key, of.shape)
            if name == "log_decay":
                x = jax.nn.log_sigmoid(x) / 16 * sharpness
            return x.astype(of.dtype)

        keys = jax.random.split(key, 5)
        return {name: one(name, of, k) for (name, of), k in zip(self.shapes().items(), keys)}

    def flops(self, chunk: int = 64) -> float:
        """Of a chunked forward pass: scores, their product with v, the state read and updated."""
        tokens = self.batch * self.length
        inside = 2 * chunk * (self.dim + self.value_dim) / 2
        across = 2 * self.dim * self.value_dim
        return tokens * (self.heads * (inside + across) + self.kv_heads * across)

    def bytes(self) -> float:
        """Arguments read once, o and the last state written once."""
        shapes = [x for x in self.shapes().values() if x is not None]
        size = jnp.dtype(self.dtype).itemsize
        out = self.batch * self.length * self.heads * self.value_dim * size
        state = self.batch * self.kv_heads * self.dim * self.value_dim * 4
        return sum(x.size * x.dtype.itemsize for x in shapes) + out + state


SMALL = {
    "gla": ArgSpec(length=70, heads=2, kv_heads=2, dim=16, value_dim=24, state=True),
    "grouped": ArgSpec(length=40, heads=4, kv_heads=2, dim=16, value_dim=16, state=True),
    "per head": ArgSpec(length=40, heads=4, kv_heads=2, dim=16, value_dim=8, gate="head"),
    "linear": ArgSpec(length=40, heads=2, kv_heads=1, dim=8, value_dim=16, gate="none"),
    "bfloat16": ArgSpec(
        batch=2, length=70, heads=2, kv_heads=1, dim=32, value_dim=32, dtype="bfloat16", state=True
    ),
}
"""What tests run."""

SMOLLM2 = ArgSpec(length=1024, heads=9, kv_heads=3, dim=64, value_dim=64)
"""One layer of SmolLM2-135M."""

BENCH = {
    f"{gate} B=2 L={length} N=16 D=128 bf16": ArgSpec(
        batch=2,
        length=length,
        heads=16,
        kv_heads=16,
        dim=128,
        value_dim=128,
        dtype="bfloat16",
        gate=gate,
    )
    for gate in GATES
    for length in (2048, 4096, 16384)
}
