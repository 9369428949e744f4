"""LoKr: a Kronecker product, either factor optionally of low rank."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flora_jax.adapters.initializers import kaiming_uniform
from flora_jax.core.adapter import Adapter, batch_dims, check_dropout
from flora_jax.core.errors import PlanError
from flora_jax.core.kron import Kron
from flora_jax.core.operators import LinearMap, Matrix
from flora_jax.core.registry import register
from flora_jax.core.spec import KernelSpec
from flora_jax.core.structured import Channelwise, branch


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """``(m, n)`` with ``m n = dimension``, as LyCORIS and HF PEFT choose them.

    m is ``factor`` if that divides the dimension; else the largest divisor up to the square root
    and, unless it is -1, up to ``factor``.

    >>> factorization(128), factorization(127), factorization(128, 4)
    ((8, 16), (1, 127), (4, 32))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    m = next(d for d in range(most, 0, -1) if dimension % d == 0)
    return m, dimension // m


def check_factor(factor: int, name: str) -> None:
    """Raise PlanError for a factor that is neither -1 nor positive."""
    if factor != -1 and factor < 1:
        raise PlanError(f"{name}={factor} must be -1 (nearest the square root) or at least 1")


class Form(NamedTuple):
    """How one weight is factored: ``in = window * m * p``, ``out = n * q``.

    Args:
      low1, low2: whether the left and the right factor are products of rank r.
      core: the right one is a Tucker-2 kernel.
    """

    m: int
    p: int
    n: int
    q: int
    window: tuple[int, ...]
    low1: bool
    low2: bool
    core: bool


@register(
    "LoKr",
    family="adapter",
    paper="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    arxiv="2309.14859",
    parameters="mn + pq or mn + r(p + q), in = mp, out = nq",
    peft="LOKR",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Adapter):
    """``dW = s w1 (x) w2``, ``w1 [m, n]``, ``w2 [p, q]``, ``in = m p``, ``out = n q``.

    ``w2 = a2 b2`` of rank r where ``r < max(p, q) / 2``, else full; with ``decompose_both`` also
    ``w1 = a1 b1`` where ``r < max(m, n) / 2``. A convolution's window belongs to w2
    (``a2 [window * p, r]``). Neither dW nor a low-rank w2 is formed: the input passes a2 block by
    block, is mixed by w1 and leaves through b2.

    Args:
      rank: r.
      alpha: ``s = alpha / r``, also where no factor is of rank r (as HF PEFT; LyCORIS has s = 1
        there: from memory).
      decompose_both: allow a low-rank w1.
      decompose_factor: m and n (see :func:`factorization`); -1 is the pair nearest the root.
      effective_conv: a low-rank w2 of a convolution with a window is a Tucker-2 kernel
        ``core2 [*window, r, r]``, ``a2 [p, r]``, ``b2 [r, q]``.
      initializer: ``peft`` (w1 or b1 zero) or ``lycoris`` (w2 or a2 zero); the rest is
        kaiming-uniform.
      dropout: rate on the branch's input.

    With batch axes or groups every member has factors of its own. PEFT's ``rank_dropout`` and
    ``module_dropout`` have no counterpart. Source: arXiv 2309.14859, HF PEFT ``tuners/lokr``.

    >>> import flora_jax as flora
    >>> shape = jax.ShapeDtypeStruct((3072, 1024), jnp.float32)
    >>> adapter = LoKr(rank=32, decompose_factor=4)
    >>> flora.plan({"kernel": shape}, {"kernel": adapter}).count
    32784
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1
    effective_conv: bool = False
    initializer: str = "peft"
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.rank

    def form(self, spec: KernelSpec, shape: tuple[int, ...]) -> Form:
        """Sizes and kinds of the factors of an unstacked kernel."""
        *_, n_in, n_out = spec.canonical_shape(shape)
        window = spec.spatial(shape)
        m, p = factorization(n_in // math.prod(window), self.decompose_factor)
        n, q = factorization(n_out, self.decompose_factor)
        low1 = self.decompose_both and self.rank < max(m, n) / 2
        low2 = self.rank < max(p, q) / 2
        core = low2 and self.effective_conv and math.prod(window) > 1
        return Form(m, p, n, q, window, low1, low2, core)

    def check(self, spec, shape):
        super().check(spec, shape)
        check_dropout(self.dropout, spec)
        check_factor(self.decompose_factor, "decompose_factor")
        if self.rank < 1:
            raise PlanError(f"rank={self.rank} must be at least 1")
        if self.initializer not in ("peft", "lycoris"):
            raise PlanError(f"initializer={self.initializer!r} is not peft or lycoris")

    def init(self, key, spec, base):
        form, batch = self.form(spec, base.shape), batch_dims(spec, base.shape)
        shapes = self._shapes(form)
        peft = self.initializer == "peft"
        zero = ("b1" if form.low1 else "w1") if peft else ("a2" if form.low2 else "w2")
        keys = jax.random.split(key, len(shapes))
        train = {}
        for k, (name, (shape, fan_in)) in zip(keys, sorted(shapes.items())):
            full = (*batch, *shape)
            train[name] = jnp.zeros(full) if name == zero else kaiming_uniform(k, full, fan_in)
        return train, {}

    def _shapes(self, form: Form) -> dict[str, tuple[tuple[int, ...], int]]:
        """``{name: (shape, fan in of the torch tensor)}``."""
        r, taps = self.rank, math.prod(form.window)
        m, p, n, q = form[:4]
        shapes = {"w1": ((m, n), m)}
        if form.low1:
            shapes = {"a1": ((m, r), m), "b1": ((r, n), r)}
        if form.core:
            shapes |= {
                "a2": ((p, r), p),
                "b2": ((r, q), q),
                "core2": ((*form.window, r, r), r * taps),
            }
        elif form.low2:
            shapes |= {"a2": ((taps * p, r), taps * p), "b2": ((r, q), r)}
        else:
            shapes |= {"w2": ((taps * p, q), taps * p)}
        return shapes

    def operator(self, params, spec, ctx):
        update = self.scale * self._product(params, self.form(spec, ctx.shape))
        return ctx.base + branch(update, self.dropout, ctx.dropout)

    def _product(self, params, form: Form) -> LinearMap:
        left = params["w1"] if "w1" in params else jnp.matmul(params["a1"], params["b1"])
        taps, one = math.prod(form.window), (..., None, slice(None), slice(None))
        if "w2" in params:
            return Kron(left[one], params["w2"][one], taps)
        right = params["a2"]
        if "core2" in params:
            core = params["core2"].reshape(*right.shape[:-2], taps, self.rank, self.rank)
            right = jnp.einsum("...pj,...wjr->...wpr", right, core)
            right = right.reshape(*right.shape[:-3], taps * form.p, self.rank)
        # w1 (x) (a2 b2) = (w1 (x) a2) (I_n (x) b2)
        return Kron(left[one], right[one], taps) @ Channelwise(Matrix(params["b2"]), form.n)
