"""Which keys a query may see: small objects, and the boolean array they stand for."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base class of masks; ``i`` is the place of a query in its sequence, ``j`` that of a key."""

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return True

    def allowed(self, i: jax.Array, j: jax.Array) -> jax.Array | None:
        """Booleans for ``i [..., T, 1]`` and ``j [..., 1, S]``; None when all are seen."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every key."""

    causal = False

    def allowed(self, i, j):
        return None


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """``j <= i``."""

    def allowed(self, i, j):
        return j <= i


CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class Sliding(Mask):
    """``0 <= i - j < window``: the last ``window`` keys, the query's own included.

    Args:
      window: a number; an array inside a scan over layers whose windows differ.
    """

    window: int | jax.Array

    def allowed(self, i, j):
        return (j <= i) & (i - j < self.window)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """``j <= i or j < length``: a prefix that sees itself whole, causal after it."""

    length: int

    causal = False

    def allowed(self, i, j):
        return (j <= i) | (j < self.length)


def visible(
    mask: Mask,
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array | None:
    """Which keys a query may see, ``[B or 1, T or 1, S]``; None when all of them.

    Args:
      q_positions, k_positions: ``[B or 1, T]`` and ``[B or 1, S]``.
      q_segments, k_segments: packed sequences see their own segment only; every segment sees
        segment -1 (the virtual tokens of a trained prompt).
      valid: ``[B or 1, S]``, true where there is a key.
    """
    parts = [mask.allowed(q_positions[:, :, None], k_positions[:, None, :])]
    if q_segments is not None:
        k_segments = k_segments[:, None, :]
        parts.append((q_segments[:, :, None] == k_segments) | (k_segments == -1))
    if valid is not None:
        parts.append(valid.astype(bool)[:, None, :])
    seen = None
    for part in parts:
        if part is not None:
            seen = part if seen is None else seen & part
    return seen
