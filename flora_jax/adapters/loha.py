"""LoHa: the Hadamard product of two low-rank updates (FedPara)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import Adapter, batch_dims, check_dropout
from flora_jax.core.errors import PlanError
from flora_jax.core.kron import Hadamard, row_products
from flora_jax.core.lowrank import transpose
from flora_jax.core.registry import register
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import branch
from flora_jax.core.tucker import Tucker


@register(
    "LoHa",
    family="adapter",
    paper="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    arxiv="2108.06098",
    parameters="2r(in + out)",
    peft="LOHA",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Adapter):
    """``dW = s (a1 b1) * (a2 b2)`` elementwise, ``a [in, r]``, ``b [r, out]``, ``s = alpha / r``.

    Rank up to ``r^2`` for the numbers of a LoRA of rank 2r. dW is never formed: it is the low-rank
    product of the row-wise Khatri-Rao factors ``[in, r^2]``, ``[r^2, out]``, which are rebuilt
    every step; a token costs ``r^2 (in + out)``, so r is meant to stay below ``sqrt(in)``.

    Args:
      rank: r of each factor pair.
      alpha: numerator of the scale.
      effective_conv: a convolution with a window gets two Tucker-2 kernels in place of two
        flattened matrices (FedPara's proposition 3): ``core [*window, r, r]``, ``a [channels, r]``,
        ``b [r, out]``. Their Hadamard product is a Tucker kernel again, of ranks r^2; its core has
        ``window r^4`` entries. No effect on other weights, nor on a 1x1 window.
      dropout: rate on the branch's input.

    Init as HF PEFT: kaiming-uniform, ``a2 = 0`` (LyCORIS draws normals: from memory). PEFT's
    ``rank_dropout`` and ``module_dropout`` have no counterpart. Source: arXiv 2108.06098, LyCORIS
    (2309.14859), HF PEFT ``tuners/loha``.

    >>> import flora_jax as flora
    >>> flora.plan({"kernel": jnp.ones((6, 4))}, {"kernel": LoHa(rank=2)}).count
    40
    """

    rank: int = 8
    alpha: float = 8.0
    effective_conv: bool = False
    dropout: float = 0.0

    dim_names = {
        **{f"a{i}": ("in", None) for i in (1, 2)},
        **{f"b{i}": (None, "out") for i in (1, 2)},
    }

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.rank

    def has_cores(self, spec: KernelSpec, shape: tuple[int, ...]) -> bool:
        """Whether a weight gets Tucker kernels."""
        return self.effective_conv and spec.window(shape) > 1

    def check(self, spec, shape):
        super().check(spec, shape)
        check_dropout(self.dropout, spec)
        if self.rank < 1:
            raise PlanError(f"rank={self.rank} must be at least 1")

    def init(self, key, spec, base):
        keys = jax.random.split(key, 6)
        r, batch = self.rank, batch_dims(spec, base.shape)
        *_, n_in, n_out = spec.canonical_shape(base.shape)
        train, fan_b = {}, r
        if self.has_cores(spec, base.shape):
            *window, n_in, n_out = base.shape
            batch, fan_b, core = (), n_out, (*window, r, r)
            for i, k in zip("12", keys[4:]):
                train[f"core{i}"] = kaiming_uniform(k, core, r * math.prod(window))
        train |= {
            "a1": kaiming_uniform(keys[0], (*batch, n_in, r), n_in),
            "b1": kaiming_uniform(keys[1], (*batch, r, n_out), fan_b),
            "a2": jnp.zeros((*batch, n_in, r)),
            "b2": kaiming_uniform(keys[2], (*batch, r, n_out), fan_b),
        }
        return train, {}

    def operator(self, params, spec, ctx):
        pairs = tuple(params[name] for name in ("a1", "b1", "a2", "b2"))
        update = self._tucker(params, spec) if "core1" in params else Hadamard(*pairs)
        return ctx.base + branch(self.scale * update, self.dropout, ctx.dropout)

    def _tucker(self, params, spec: KernelSpec) -> Tucker:
        """The product of two Tucker kernels: a Kronecker core per tap, Khatri-Rao factors."""
        core = jnp.einsum("...ab,...cd->...acbd", params["core1"], params["core2"])
        core = core.reshape(*core.shape[:-4], self.rank**2, self.rank**2)
        into = row_products(params["a1"], params["a2"])
        out = row_products(transpose(params["b1"]), transpose(params["b2"]))
        return Tucker(core, (*(None for _ in core.shape[:-2]), into, out), spec)
