"""Every attention case that the contracts cross. A new variant adds a line to ``CASES``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import attention
from flora_jax.attention import Inputs, Sizes, Sliding, Variant
from flora_jax.models.rope import Rope, rotate

SIZES = Sizes(heads=4, kv_heads=2, dim=8, width=32)
T = 13


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant and what the contracts must know of it.

    Args:
      count: its own parameters at ``SIZES``.
      linear: temporaries grow as T, not T^2.
      mask: of its causal contracts.
      shuffles: bidirectional, its output ignores the order of the keys (no convolution, no grid).
    """

    variant: Variant
    count: int = 0
    linear: bool = True
    mask: attention.Mask = attention.Causal()
    shuffles: bool = True


CASES: dict[str, Case] = {
    "Softmax": Case(attention.Softmax(), linear=False),
    "Softmax-jax": Case(attention.Softmax(implementation="jax"), linear=False),
    "Softmax-chunked": Case(attention.Softmax(implementation="chunked", chunk=4)),
    "Softmax-window": Case(attention.Softmax(), mask=Sliding(4)),
    "Linear-elu1": Case(attention.LinearAttention(chunk=4)),
    "Linear-relu": Case(attention.LinearAttention(feature_map="relu", chunk=5)),
    "Linear-softmax": Case(attention.LinearAttention(feature_map="softmax")),
    "Linear-exp": Case(attention.LinearAttention(feature_map="exp", chunk=4)),
    "Linear-taylor2": Case(attention.LinearAttention(feature_map="taylor2", chunk=4)),
    "Linear-dpfp2": Case(attention.LinearAttention(feature_map="dpfp2", chunk=4)),
    "Linear-t2r": Case(
        attention.LinearAttention(feature_map="t2r", feature_dim=6, chunk=4), 2 * 4 * (8 + 1) * 6
    ),
    "Hedgehog": Case(attention.Hedgehog(chunk=4), 2 * 4 * 8 * 8),
    "Hedgehog-exp": Case(
        attention.Hedgehog(feature_map="exp", bias=True, feature_dim=5, chunk=4), 2 * 4 * 9 * 5
    ),
    "Hedgehog-joint": Case(
        attention.Hedgehog(feature_map="joint", skip=True, start="zero", chunk=4), 2 * 4 * 8 * 8
    ),
    "Distil": Case(attention.Distil(rows=5), 2 * 4 * 8 * 8, linear=False),
    "LoLCATs": Case(attention.LoLCATs(window=4, feature_dim=6, chunk=4), 2 * 4 * 8 * 6 + 4),
    "LoLCATs-scale": Case(
        attention.LoLCATs(
            window=3, affine=True, keep_scale=True, start="kaiming", feature_map="exp_shifted"
        ),
        2 * 4 * 8 * 8 + 4,
    ),
    "InLine": Case(attention.InLine(residual=False, chunk=4)),
    "InLine-residual": Case(
        attention.InLine(), 10 * 32**2 // 4 + 10 * 32, mask=attention.Full(), shuffles=False
    ),
    "InLine-division": Case(
        attention.InLine(division=True, feature_map="relu", residual=False, chunk=5)
    ),
    "SLA": Case(
        attention.SLA(block_q=4, block_k=2, critical=0.3),
        8 * 8 + 8,
        linear=False,
        mask=attention.Full(),
        shuffles=False,
    ),
    "LiT": Case(attention.LiT(window=3), (9 + 1) * 32, mask=attention.Full(), shuffles=False),
    "GLA": Case(attention.GLA(chunk=4, rank=3), 3 * (32 + 16) + 16 + 8 + 32 * 32),
    "Liger": Case(attention.Liger(window=4, chunk=4)),
    "Liger-hgrn2": Case(attention.Liger(form="hgrn2", window=3, chunk=8)),
    "Liger-no-window": Case(attention.Liger(weights=(0.0, 1.0), chunk=4)),
}
CAUSAL = [n for n, c in CASES.items() if attention.Causal in c.variant.masks]
BIDIRECTIONAL = [n for n, c in CASES.items() if attention.Full in c.variant.masks]
GENERATES = [n for n, c in CASES.items() if c.variant.generates]


def takes(option: str) -> list[str]:
    return [n for n, c in CASES.items() if option in c.variant.takes]


def params_of(case: Case, seed: int = 0) -> Any:
    """Its parameters, moved off any start at which they do nothing."""
    params = case.variant.init(jax.random.key(seed), SIZES, jnp.float32)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves) + 1)
    return tree.unflatten(
        [a + 0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    )


def tokens_of(seed: int = 0, length: int = T, batch: int = 2) -> dict[str, jax.Array]:
    """What a layer makes of some tokens: ``x``, and queries, keys and values before rotation."""
    x, q, k, v = jax.random.split(jax.random.key(seed), 4)
    draw = lambda key, *shape: jax.random.normal(key, (batch, length, *shape))
    return {
        "x": draw(x, SIZES.width),
        "q": draw(q, SIZES.heads, SIZES.dim),
        "k": draw(k, SIZES.kv_heads, SIZES.dim),
        "v": draw(v, SIZES.kv_heads, SIZES.dim),
    }


def layer(tokens: dict[str, jax.Array], start: Any = 0) -> tuple[Any, ...]:
    """``(q, k, v, inputs)`` of tokens whose positions start there (``[B, 1]`` or a number)."""
    length = tokens["q"].shape[1]
    cos, sin = Rope(theta=100.0).angles(start + jnp.arange(length)[None], SIZES.dim)
    turn = lambda x: rotate(x, cos, sin)
    inputs = Inputs(x=tokens["x"], q=tokens["q"], k=tokens["k"], rotate=turn, grid=(3, 4))
    return turn(tokens["q"]), turn(tokens["k"]), tokens["v"], inputs


def attend(
    case: Case, params: Any, tokens: dict[str, jax.Array], *, start: Any = 0, **call: Any
) -> tuple[jax.Array, Any]:
    """``variant.attend`` on tokens whose positions start there."""
    q, k, v, inputs = layer(tokens, start)
    return case.variant.attend(params, q, k, v, inputs=inputs, **({"mask": case.mask} | call))


def cut(tokens: dict[str, jax.Array], low: int, high: int) -> dict[str, jax.Array]:
    return {name: x[:, low:high] for name, x in tokens.items()}


def rows_from(tokens: dict[str, jax.Array], starts: Any, count: int) -> dict[str, jax.Array]:
    """The next ``count`` tokens of each row."""
    part = lambda x: jnp.stack([x[b, e : e + count] for b, e in enumerate(starts)])
    return {name: part(x) for name, x in tokens.items()}
