"""Low-rank approximations of a change, to a rank, an energy or an error, and what they cost."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError, PlanError
from flora_jax.core.linalg import SVD, product_svd, randomized_svd, svd
from flora_jax.core.lowrank import Factors
from flora_jax.engine.changes import Change

# A full SVD of more columns than this is worth avoiding when far fewer triplets are wanted.
SMALL = 256
FIRST = 16

_svd = jax.jit(svd)
_product = jax.jit(product_svd)
_sketch = jax.jit(randomized_svd, static_argnames=("rank", "iterations"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """How much of a change to keep: at most ``rank`` components, no more than the share needs.

    Args:
      rank: at most so many components.
      energy: the fewest components that keep this share of ``|dW|^2``.
      error: the fewest components within this relative Frobenius error.
      randomized: a random sketch instead of the full SVD of a dense change; None decides by size.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    randomized: bool | None = None

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"energy={self.energy} is outside (0, 1]")
        if self.error is not None and not 0.0 <= self.error < 1.0:
            raise ConfigError(f"error={self.error} is outside [0, 1)")
        if self.energy is not None and self.error is not None:
            raise ConfigError(f"energy={self.energy} and error={self.error}: give one of them")

    @property
    def given(self) -> bool:
        """Whether anything limits the rank."""
        return (self.rank, self.energy, self.error) != (None, None, None)

    @property
    def share(self) -> float | None:
        """The share of ``|dW|^2`` to keep."""
        return self.energy if self.error is None else 1.0 - self.error**2

    def choose(self, s: Any, total: Any) -> int:
        """The rank for singular values ``[.., k]`` of matrices with ``|dW|^2 = total [..]``."""
        s = np.asarray(s, np.float64)
        rank = s.shape[-1]
        if self.share is not None:
            kept = np.cumsum(s**2, axis=-1) >= self.share * np.asarray(total)[..., None] * (
                1 - 1e-7
            )
            enough = np.where(kept.any(-1), kept.argmax(-1) + 1, s.shape[-1])
            rank = int(enough.max())
        return max(1, min(rank, self.rank or rank))


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Factors that stand for a change, and how well."""

    a: jax.Array
    b: jax.Array
    exact: bool
    error: float

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def compress(change: Change, target: Target) -> Compressed:
    """Exact factors, cut to the target where there is one; else an SVD of the dense change.

    Raises:
      PlanError: the change has no exact factors and the target sets no limit.
    """
    factors = change.factors()
    if factors is not None:
        return _from_factors(factors, target)
    if not target.given:
        raise PlanError(
            f"{change.path}: this change is not known to be low-rank; give rank=, energy= or error="
        )
    return from_matrix(change.matrix(), target, change.path)


def _from_factors(factors: Factors, target: Target) -> Compressed:
    a, b = factors
    limit = min(a.shape[-2], b.shape[-1])
    if a.shape[-1] == 0:
        shape = (*a.shape[:-1], 1), (*b.shape[:-2], 1, b.shape[-1])
        return Compressed(jnp.zeros(shape[0]), jnp.zeros(shape[1]), True, 0.0)
    if a.shape[-1] <= min(limit, target.rank or limit) and target.share is None:
        return Compressed(a, b, True, 0.0)
    found = _product(a, b)
    s = np.asarray(found.s, np.float64)
    total = np.square(s).sum(-1)
    rank = target.choose(s, total)
    tail = np.square(s[..., rank:]).sum(-1)
    error = float(np.sqrt(np.max(tail / np.where(total == 0, 1.0, total), initial=0.0)))
    return Compressed(*found.truncate(rank).split(), rank == s.shape[-1], error)


def from_matrix(matrix: jax.Array, target: Target, path: str) -> Compressed:
    """An SVD of dense changes ``[.., in, out]``, full or by a random sketch, cut to the target."""
    total = np.asarray(jnp.sum(jnp.square(matrix), axis=(-2, -1)), np.float64)
    found, full = _decompose(matrix, target, total, path)
    rank = target.choose(found.s, total)
    a, b = found.truncate(rank).split()
    rest = np.asarray(_residue(matrix, a, b), np.float64)
    error = float(np.sqrt(np.max(rest / np.where(total == 0, 1.0, total), initial=0.0)))
    return Compressed(a, b, full and rank == min(matrix.shape[-2:]), error)


@jax.jit
def _residue(matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(matrix - jnp.matmul(a, b)), axis=(-2, -1))


def _decompose(matrix: jax.Array, target: Target, total: Any, path: str) -> tuple[SVD, bool]:
    """``(triplets, whether they are all)``; a sketch doubles until the target's share is met."""
    limit = min(matrix.shape[-2:])
    randomized = target.randomized
    if randomized is None:
        randomized = limit > SMALL and 4 * (target.rank or FIRST) <= limit
    if not randomized:
        return _svd(matrix), True
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    rank = min(target.rank or FIRST, limit)
    while True:
        found = _sketch(matrix, rank=rank, key=key)
        captured = np.square(np.asarray(found.s, np.float64)).sum(-1)
        met = target.share is None or (captured >= target.share * total * (1 - 1e-7)).all()
        if target.rank is not None or met or rank == limit:
            return found, False
        if 4 * rank > limit:
            return _svd(matrix), True
        rank = min(2 * rank, limit)
