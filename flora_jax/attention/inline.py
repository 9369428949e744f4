"""InLine attention: linear attention that subtracts where others divide, with a local residual."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.attention.grid import add_patches, draw_conv, patches, window_sums
from flora_jax.attention.linear import causal_sums, init_sums, read, repeat_heads, sums
from flora_jax.attention.masks import CAUSAL, Causal, Full, Mask
from flora_jax.attention.types import Call, Sizes, Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.registry import register

MAPS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "exp": jnp.exp,
}


@register(
    "InLine",
    family="attention",
    paper="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    arxiv="2412.06590",
    parameters="10 C^2 / N + 10 C (residual)",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class InLine(Variant):
    """Injective linear attention: rows sum to one because a mean is taken off, not divided by.

    ``w_ij = (s / n) (phi(q_i) . phi(k_j) - phi(q_i) . kbar) + 1 / n``, so that
    ``o_i = (s / n) phi(q_i) sum_j phi(k_j)^T v_j + (1 - s phi(q_i) . kbar) vbar`` with the means
    ``kbar, vbar`` over the n keys; ``s = H ** -0.5``. Weights may be negative. With ``residual`` a
    3x3 depth-wise convolution of v over the grid of patches is added, whose kernel
    ``[B, 3, 3, C]`` a small grouped MLP makes from the mean of the layer's input ``x [B, T, C]``;
    a class token takes no part in it. Sums in float32.

    The causal form, with n and the means running over ``j <= i``, is ours, and needs
    ``residual=False``: the mean of x and the window see later tokens.

    Args:
      feature_map: phi: ``identity``, ``relu``, ``leaky_relu`` or ``exp``.
      residual: the local term.
      division: divide by ``phi(q_i) . sum_j phi(k_j) + eps`` as linear attention does, in place of
        all that is InLine but the residual: the paper's control; the feature map must not be
        negative.
      chunk: tokens of a chunk in the causal form.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> bool(jnp.allclose(InLine(residual=False).attend({}, x, x, x, mask=Full())[0], x))
    True
    """

    feature_map: str = "identity"
    residual: bool = True
    division: bool = False
    eps: float = 1e-6
    chunk: int = 64

    def __post_init__(self):
        if self.feature_map not in MAPS:
            raise ConfigError(unknown("feature_map", self.feature_map, MAPS))
        if self.division and self.feature_map not in ("relu", "exp"):
            raise ConfigError(f"InLine(division=True) divides by sums of {self.feature_map}")

    @property
    def masks(self) -> tuple[type[Mask], ...]:
        """Only Full with the residual."""
        return (Full,) if self.residual else (Causal, Full)

    @property
    def takes(self) -> tuple[str, ...]:
        """A grid of patches has no padding."""
        return ("scale",) if self.residual else ("valid", "scale")

    @property
    def generates(self) -> bool:
        """Only without the residual."""
        return not self.residual

    @property
    def needs(self) -> tuple[str, ...]:
        """What the residual reads."""
        return ("x", "grid") if self.residual else ()

    def check(self, sizes):
        if self.residual and sizes.width % sizes.heads:
            raise ConfigError(f"InLine: {sizes.heads} heads do not divide the width {sizes.width}")

    def init(self, key, sizes, dtype):
        if not self.residual:
            return {}
        first, second = jax.random.split(key)
        width, per_head = sizes.width, sizes.width // sizes.heads
        outputs = 9 * sizes.heads * sizes.dim
        return {
            "residual_in": draw_conv(first, (1, 1, per_head, width), dtype),
            "residual_out": draw_conv(second, (1, 1, per_head, outputs), dtype),
        }

    def whole(self, params, q, k, v, call):
        fq, fk, wide = self._map(q), self._map(k), v.astype(jnp.float32)
        there = jnp.ones(k.shape[:2]) if call.valid is None else call.valid
        there = there.astype(jnp.float32)[..., None, None]
        fk, wide = fk * there, wide * there
        if call.mask.causal:
            none = self._none(k.shape[0], fk.shape[2], fk.shape[3], v.shape[3])
            out = self._running(fq, fk, wide, there, none, call)[0]
            return out.astype(q.dtype)
        keys, count = sums(fk, wide), there.sum(axis=1, keepdims=True)
        out = self._normalise(fq, *read(fq, keys), wide.sum(axis=1, keepdims=True), count, call)
        if self.residual:
            out = add_patches(out, self._local(params, v, q.shape[2], call))
        return out.astype(q.dtype)

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> dict[str, jax.Array]:
        return self._none(batch, sizes.kv_heads, sizes.dim, sizes.dim)

    def extend(self, params, q, k, v, state, call):
        fq, fk, wide = self._map(q), self._map(k), v.astype(jnp.float32)
        there = jnp.ones(k.shape[:2]) if call.valid is None else call.valid
        there = there.astype(jnp.float32)[..., None, None]
        out, state = self._running(fq, fk * there, wide * there, there, state, call)
        return out.astype(q.dtype), state

    def _map(self, x: jax.Array) -> jax.Array:
        return MAPS[self.feature_map](x.astype(jnp.float32))

    def _none(self, batch: int, heads: int, features: int, dim: int) -> dict[str, jax.Array]:
        start = init_sums(batch, heads, features, dim)
        return start | {"v": jnp.zeros((batch, 1, heads, dim)), "n": jnp.zeros((batch, 1, 1, 1))}

    def _running(self, fq, fk, v, there, state, call: Call):
        """The causal form after a state; ``fk`` and ``v`` are zero where ``there`` is."""
        keys = {name: state[name] for name in ("S", "z")}
        out, norm, keys = causal_sums(fq, fk, v, keys, chunk=self.chunk)
        values, count = jnp.cumsum(v, axis=1) + state["v"], jnp.cumsum(there, axis=1) + state["n"]
        state = keys | {"v": values[:, -1:], "n": count[:, -1:]}
        return self._normalise(fq, out, norm, values, count, call), state

    def _normalise(self, fq, out, norm, values, count, call: Call) -> jax.Array:
        """From the sums over the keys a query sees: ``out [B,T,N,H]``, ``norm [B,T,N]``,
        ``values [B,T or 1,K,H]`` and how many they are.
        """
        if self.division:
            return out / (norm + self.eps)[..., None]
        scale = fq.shape[-1] ** -0.5 if call.scale is None else call.scale
        count = jnp.maximum(count, 1)
        mean = repeat_heads(values / count, fq.shape[2])
        return scale / count * (out - norm[..., None] * mean) + mean

    def _local(self, params, v, heads, call: Call) -> jax.Array:
        """The window sums ``[B, h, w, C]`` of v, in float32."""
        mean = call.inputs.x.mean(axis=1, dtype=jnp.float32)

        def layer(name: str, y: jax.Array) -> jax.Array:
            y = ops.conv(y, params[name]["kernel"], groups=heads)
            return y + ops.value(params[name]["bias"], y.dtype)

        inner = jax.nn.gelu(layer("residual_in", mean[:, None, None]), approximate=False)
        made = layer("residual_out", inner)
        # Channel by channel nine numbers, as the official code reads them.
        kernel = made.reshape(len(mean), -1, 3, 3).transpose(0, 2, 3, 1)
        values = patches(repeat_heads(v, heads).astype(jnp.float32), call.inputs.grid)
        return window_sums(values, kernel)
