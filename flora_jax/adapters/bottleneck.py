"""The bottleneck adapter of Houlsby et al.: a small MLP on a layer's output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flora_jax.core.adapter import ActivationAdapter, output_sizes
from flora_jax.core.contraction import mm, over_batch
from flora_jax.core.errors import PlanError, unknown
from flora_jax.core.registry import register

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(ActivationAdapter):
    """What the bottleneck methods share: the width of the bottleneck and its activation.

    Args:
      bottleneck: width d; None gives ``out // reduction``.
      reduction: used when ``bottleneck`` is None.
      activation: ``gelu``, ``gelu_new`` (its tanh form), ``relu``, ``swish`` or ``tanh``.
    """

    bottleneck: int | None = None
    reduction: int = 32
    activation: str = "gelu_new"

    def width(self, n_out: int) -> int:
        """d for a layer of so many outputs."""
        return n_out // self.reduction if self.bottleneck is None else self.bottleneck

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.activation not in ACTIVATIONS:
            raise PlanError(unknown("activation", self.activation, ACTIVATIONS))
        _, n_out = output_sizes(spec, shape)
        if self.reduction < 1 or self.width(n_out) < 1:
            wide = f"reduction={self.reduction}" if self.bottleneck is None else ""
            wide = wide or f"bottleneck={self.bottleneck}"
            raise PlanError(f"{wide} leaves no bottleneck for {n_out} outputs")

    def activate(self, params, y, spec, ctx):
        branch = functools.partial(self.branch, pool=ctx.pool)
        # One adapter for each expert: arrays and outputs both lead with the batch axis.
        return y + (jax.vmap(branch) if spec.batch_axes else branch)(params, y)

    def branch(self, params, y: jax.Array, pool) -> jax.Array:
        """``up(act(down y))`` for ``y [..., out]``."""
        raise NotImplementedError


@register(
    "Bottleneck",
    family="adapter",
    paper="Parameter-Efficient Transfer Learning for NLP",
    arxiv="1902.00751",
    parameters="2 d out + d + out",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(BottleneckAdapter):
    """``h' = h + act(h D + b_d) U + b_u``, ``D [out, d]``, ``U [d, out]``, h a layer's output.

    A rule puts it on the kernel whose layer it follows: the paper's two places are the output
    projection of the attention and the second projection of the MLP, before the residual sum. The
    layer norms are trained beside it by a rule with ``Replace()``. Arrays are float32; one adapter
    for each expert of a batched kernel; a convolution's outputs are its channels.

    Args:
      bottleneck, reduction, activation: see :class:`BottleneckAdapter`; d = 64 in the paper.
      std: D and U start as normal numbers cut at two deviations, biases as 0: NOT exactly the
        identity. The paper says 1e-2, its code (google-research/adapter-bert) 1e-3, which is used.

    Source: arXiv 1902.00751 and ``modeling.py`` of its repository (gelu in the bottleneck).

    >>> import flora_jax as flora
    >>> params = {"mlp": {"down_proj": {"kernel": jnp.zeros((12, 8))}}}
    >>> flora.plan(params, {".*": Bottleneck(bottleneck=2)}).count
    42
    """

    std: float = 1e-3

    dim_names = {
        "down": ("out", None),
        "down_bias": (None,),
        "up": (None, "out"),
        "up_bias": ("out",),
    }

    def init(self, key, spec, base):
        batch, n_out = output_sizes(spec, base.shape)
        d = self.width(n_out)

        def draw(key, shape):
            return self.std * jax.random.truncated_normal(key, -2.0, 2.0, shape)

        down, up = jax.random.split(key)
        return {
            "down": draw(down, (*batch, n_out, d)),
            "down_bias": jnp.zeros((*batch, d)),
            "up": draw(up, (*batch, d, n_out)),
            "up_bias": jnp.zeros((*batch, n_out)),
        }, {}

    def branch(self, params, y, pool):
        z = mm(y, params["down"]) + over_batch(params["down_bias"], y)
        z = ACTIVATIONS[self.activation](z)
        return mm(z, params["up"]) + over_batch(params["up_bias"], y)
