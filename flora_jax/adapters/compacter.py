"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from flora_jax.adapters.bottleneck import ACTIVATIONS, BottleneckAdapter
from flora_jax.adapters.initializers import xavier_uniform
from flora_jax.core.adapter import output_sizes
from flora_jax.core.contraction import over_batch
from flora_jax.core.errors import PlanError
from flora_jax.core.kron import Kron
from flora_jax.core.operators import LinearMap, operator
from flora_jax.core.registry import register


@operator
class FactoredKron(LinearMap):
    """``M = sum_i A_i (x) s_i t_i``; A ``[k, m, n]``, s ``[k, p, r]``, t ``[k, r, q]``.

    Applied by reshaping and three small products; neither M nor any ``s_i t_i`` is formed.
    """

    left: jax.Array
    s: jax.Array
    t: jax.Array

    def then(self, y):
        (_, m, n), (_, p, _), (_, _, q) = self.left.shape, self.s.shape, self.t.shape
        left, s, t = (a.astype(y.dtype) for a in (self.left, self.s, self.t))
        z = y.reshape(*y.shape[:-1], m, p)
        z = jnp.einsum("...mp,kpr->...mkr", z, s)
        z = jnp.einsum("...mkr,kmn->...nkr", z, left)
        z = jnp.einsum("...nkr,krq->...nq", z, t)
        return z.reshape(*y.shape[:-1], n * q)

    def dense(self):
        return Kron(self.left, jnp.matmul(self.s, self.t)).dense()

    @property
    def T(self):
        swap = lambda a: jnp.swapaxes(a, -1, -2)
        return FactoredKron(swap(self.left), swap(self.t), swap(self.s))

    def flops(self):
        (_, m, n), (k, p, r), q = self.left.shape, self.s.shape, self.t.shape[-1]
        return 2 * k * r * (m * p + m * n + n * q)


@register(
    "Compacter",
    family="adapter",
    paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
    arxiv="2106.04647",
    parameters="2 rank (out + d) + d + out, + n^3 once",
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(BottleneckAdapter):
    """``h' = h + act(h P_d + b_d) P_u + b_u``, ``P = sum_{i<=n} A_i (x) (s_i t_i)``.

    ``P_d [out, d]`` has ``A_i [n, n]``, ``s_i [out/n, rank]``, ``t_i [rank, d/n]``; P_u
    ``[d, out]`` has the sizes swapped. One set ``A [n, n, n]`` serves both projections of every
    adapter of this configuration (``adapters["pool/Compacter"]``) and receives the sum of their
    gradients. P is never formed. Arrays are float32; A is tiny, so keep it so.

    Compacter: a rule for the output projections of attention and MLP. Compacter++: for the MLP's
    only. Both train the layer norms too (``Replace()`` by a rule).

    Args:
      bottleneck, reduction, activation: d, see :class:`BottleneckAdapter`.
      n: the number of terms and the size of A_i; divides ``out`` and d.
      rank: of the ``B_i = s_i t_i``.
      factorized: False gives plain PHM adapters with whole ``B_i [out/n, d/n]``.
      shared: False gives each projection an A of its own (``a_down``, ``a_up``), as in the PHM
        adapters of the paper's comparison.
      phm_init: of A: ``normal`` or ``uniform`` (then far from the identity at init).
      phm_range: deviation of the normal, bound of the uniform; None takes the code's: 1e-4 and 1
        for a shared A, 0.01 and 0.01 otherwise.

    s_i, t_i (or B_i) start Glorot-uniform with gain sqrt 2 per i, biases at 0. With the normal A
    the start is not exactly the identity: the change is below 1e-3 of the input's norm.

    Source: arXiv 2106.04647 (id from memory) and rabeehk/compacter, ``compacter.json``. Read there
    and followed where the paper is silent: ``T5ForConditionalGeneration`` makes one ``phm_rule``
    and hands it to the down and the up projection of all adapters. Not reproduced:
    ``factorized_phm_rule``, ``shared_W_phm``.

    >>> import flora_jax as flora
    >>> params = {"mlp": {"down_proj": {"kernel": jnp.zeros((3072, 768))}}}
    >>> flora.plan(params, {".*": Compacter()}).count == 2376 + 4 ** 3
    True
    """

    n: int = 4
    rank: int = 1
    factorized: bool = True
    shared: bool = True
    phm_init: str = "normal"
    phm_range: float | None = None

    dim_names = {"down_bias": (None,), "up_bias": ("out",)}

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """Whether A is shared."""
        return self.shared

    def check(self, spec, shape):
        super().check(spec, shape)
        _, n_out = output_sizes(spec, shape)
        d = self.width(n_out)
        if self.n < 1 or n_out % self.n or d % self.n:
            raise PlanError(
                f"n={self.n} does not divide both the {n_out} outputs and the bottleneck of {d}; "
                f"nearest that does: n={_nearest_divisor(self.n, math.gcd(n_out, d))}"
            )
        if self.rank < 1:
            raise PlanError(f"rank={self.rank} must be at least 1")
        if self.phm_init not in ("normal", "uniform"):
            raise PlanError(f"phm_init={self.phm_init!r} is not normal or uniform")

    def _terms(self, key: jax.Array) -> jax.Array:
        """``A [n, n, n]``."""
        shape, scale = (self.n,) * 3, self.phm_range
        if scale is None:
            scale = 0.01 if not self.shared else 1e-4 if self.phm_init == "normal" else 1.0
        if self.phm_init == "normal":
            return scale * jax.random.normal(key, shape)
        return jax.random.uniform(key, shape, minval=-scale, maxval=scale)

    def pool(self, key, entries):
        return {"a": self._terms(key)}, {}

    def init(self, key, spec, base):
        batch, n_out = output_sizes(spec, base.shape)
        d, keys = self.width(n_out), jax.random.split(key, 6)

        def glorot(key, rows, columns):
            shape = (*batch, self.n, rows, columns)
            return math.sqrt(2.0) * xavier_uniform(key, shape, rows + columns)

        train = {"down_bias": jnp.zeros((*batch, d)), "up_bias": jnp.zeros((*batch, n_out))}
        wide, narrow = n_out // self.n, d // self.n
        if self.factorized:
            train["down_s"] = glorot(keys[0], wide, self.rank)
            train["down_t"] = glorot(keys[1], self.rank, narrow)
            train["up_s"] = glorot(keys[2], narrow, self.rank)
            train["up_t"] = glorot(keys[3], self.rank, wide)
        else:
            train["down_b"] = glorot(keys[0], wide, narrow)
            train["up_b"] = glorot(keys[2], narrow, wide)
        if not self.shared:
            for name, k in (("a_down", keys[4]), ("a_up", keys[5])):
                train[name] = jnp.broadcast_to(self._terms(k), (*batch, *(self.n,) * 3))
        return train, {}

    def projection(self, params, pool, which: str) -> LinearMap:
        """``P_d`` or ``P_u`` as a map; ``which`` is ``down`` or ``up``."""
        a = pool["a"] if self.shared else params[f"a_{which}"]
        if not self.factorized:
            return Kron(a, params[f"{which}_b"])
        return FactoredKron(a, params[f"{which}_s"], params[f"{which}_t"])

    def branch(self, params, y, pool):
        z = self.projection(params, pool, "down").then(y) + over_batch(params["down_bias"], y)
        z = ACTIVATIONS[self.activation](z)
        return self.projection(params, pool, "up").then(z) + over_batch(params["up_bias"], y)


def _nearest_divisor(n: int, common: int) -> int:
    divisors = [k for k in range(1, common + 1) if common % k == 0]
    return min(divisors, key=lambda k: (abs(k - n), k))
