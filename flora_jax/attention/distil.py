"""Distillation of softmax attention into a linear one, a layer at a time, a row block at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.attention.hedgehog import Hedgehog
from flora_jax.attention.linear import repeat_heads
from flora_jax.attention.masks import CAUSAL, Causal, Full, Mask, visible
from flora_jax.attention.softmax import Softmax
from flora_jax.attention.types import Call, Sizes, Variant
from flora_jax.attention.window import MASKED
from flora_jax.core.registry import register

FLOOR = 1e-12


def mimicry(
    student: Hedgehog,
    params: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    call: Call,
    rows: int = 64,
) -> dict[str, jax.Array]:
    """How far a student's attention is from softmax on the same queries and keys.

    ``xent_i = -sum_j a_ij log max(b_ij, 1e-12)`` with the softmax's weights a and the student's b,
    and ``mse_i = mean_d (sum_j a_ij v_j - sum_j b_ij v_j)^2``, both averaged over heads. Weights
    exist for ``rows`` queries at a time, forwards and backwards.

    Args:
      q, k, v: ``[B, T, N, H]`` and ``[B, T, K, H]``; no gradient flows into them.
      call: of the attention: its mask, ``valid``, ``segment_ids``, ``scale``.

    Returns:
      ``xent`` and ``mse``, ``[B, T]`` each.
    """
    q, k, v = jax.lax.stop_gradient((q, k, v))
    batch, length, heads, dim = q.shape
    size = min(rows, length)
    count = -(-length // size)
    scale = dim**-0.5 if call.scale is None else call.scale
    fk = repeat_heads(student.k_features(params, k), heads)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads).astype(jnp.float32)
    places = jnp.arange(length)[None]

    def cut(x: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    xs = {"q": cut(q), "f": cut(student.q_features(params, q)), "at": cut(places)}
    if call.segment_ids is not None:
        xs["segments"] = cut(call.segment_ids)

    def block(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen = visible(
            call.mask,
            x["at"],
            places,
            q_segments=x.get("segments"),
            k_segments=call.segment_ids,
            valid=call.valid,
        )
        seen = jnp.ones((1, 1, length), bool) if seen is None else seen
        scores = jnp.einsum("brnd,bsnd->bnrs", x["q"] * scale, k).astype(jnp.float32)
        scores = jnp.where(seen[:, None], scores, MASKED)
        theirs = jax.nn.softmax(scores, axis=-1)
        gap = x["at"][0, :, None] - places
        ours = student.similarity(params, x["f"], fk, scores, gap)
        ours = jnp.where(seen[:, None], ours, 0)
        ours = ours / (ours.sum(axis=-1, keepdims=True) + student.eps)
        xent = -(theirs * jnp.log(jnp.maximum(ours, FLOOR))).sum(axis=-1).mean(axis=1)
        out = jnp.einsum("bnrs,bsnd->brnd", theirs - ours, v)
        return xent, jnp.square(out).mean(axis=(2, 3))

    each = jax.lax.map(jax.checkpoint(block, prevent_cse=False), xs)
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(batch, count * size)[:, :length]
    return {"xent": join(each[0]), "mse": join(each[1])}


@register(
    "Distil",
    family="attention",
    paper="The Hedgehog & the Porcupine; LoLCATs: On Low-Rank Linearizing of Large Language Models",
    arxiv="2402.04347, 2410.10254",
    parameters="of the student",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Variant):
    """Softmax attention that also reports how far a student is from it: the first stage.

    Every layer sees the teacher's activations, so that layers are learnt apart from one another.
    In training the second result is ``{"xent": [B, T], "mse": [B, T]}`` (:func:`mimicry`); a model
    gives it back stacked over layers, for ``flora_jax.training.losses.Distillation``. Its
    parameters are the student's, in the same place.

    Args:
      student: ``Hedgehog`` or ``LoLCATs``.
      rows: queries at a time of the report.
    """

    masks: ClassVar = (Causal, Full)
    takes: ClassVar = ("segment_ids", "valid", "scale")

    student: Hedgehog = Hedgehog()
    rows: int = 64

    def check(self, sizes: Sizes) -> None:
        self.student.check(sizes)

    def init(self, key: jax.Array, sizes: Sizes, dtype: Any) -> dict[str, Any]:
        return self.student.init(key, sizes, dtype)

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> dict[str, jax.Array]:
        return Softmax().init_state(sizes, batch, max_len, dtype, mask)

    def whole(self, params, q, k, v, call):
        return Softmax().whole({}, q, k, v, call)

    def report(self, params, q, k, v, call):
        return mimicry(self.student, params, q, k, v, call, self.rows)

    def extend(self, params, q, k, v, state, call):
        return Softmax().extend({}, q, k, v, state, call)
