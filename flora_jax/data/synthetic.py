"""Synthetic regression tasks with known answers: teacher-student and a one-dimensional sine."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data import pipeline
from flora_jax.data.generated import Generated, array_evaluation
from flora_jax.data.packing import Batch

STRUCTURES = ("low_rank", "output_side", "singular_values", "kronecker", "block_diagonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStudent(Generated):
    """TS(d, k): learn ``y = x (W0 + D) + noise`` from a known start W0 and an unknown update D.

    Kernels are (in, out). ``x ~ N(0, C)`` with C diagonal, its eigenvalues log-spaced from 1 down
    to ``1 / condition``. Batches: ``x`` [B, d_in], ``y`` [B, d_out], ``weight`` [B], float32.

    Example:
        >>> task = TeacherStudent(d=8, k=2)
        >>> w0, update = task.teacher()
        >>> int(np.linalg.matrix_rank(update)), task.floor(2), task.floor(1) > 0
        (2, 0.0, True)

    Attributes:
        d: input dimension.
        d_out: output dimension; d if None.
        k: the rank (``low_rank``, ``output_side``), number of changed singular values
            (``singular_values``), number of terms (``kronecker``) or blocks (``block_diagonal``).
        structure: ``low_rank``: D = A B; ``output_side``: D = W0 M with M of rank k, a multiplier
            after the layer; ``singular_values``: D = U diag(e) V^T with the leading singular
            vectors of W0; ``kronecker``: D = sum_i A_i (x) B_i with nearly square factors;
            ``block_diagonal``.
        scale: Frobenius norm of D relative to that of W0.
        base_rank: rank of W0; full if None.
        condition: ratio of the extreme eigenvalues of the inputs' covariance.
        noise: standard deviation of the noise on y.
        task_seed: of W0 and D, apart from the training seed.
        eval_size: examples of the evaluation.
    """

    d: int = 32
    d_out: int | None = None
    k: int = 4
    structure: str = "low_rank"
    scale: float = 0.5
    base_rank: int | None = None
    condition: float = 1.0
    noise: float = 0.0
    task_seed: int = 0
    eval_size: int = 1024

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise ConfigError(unknown("structure", self.structure, STRUCTURES))
        most = min(self.d, self.d_out or self.d)
        if not 1 <= self.k <= most:
            raise ConfigError(f"k={self.k} must be between 1 and {most}")
        if self.structure == "block_diagonal" and (self.d % self.k or self._d_out % self.k):
            raise ConfigError(f"k={self.k} blocks do not divide {self.d} x {self._d_out}")
        if self.condition < 1:
            raise ConfigError(f"condition must be at least 1, got {self.condition}")

    @property
    def _d_out(self) -> int:
        return self.d if self.d_out is None else self.d_out

    def teacher(self) -> tuple[np.ndarray, np.ndarray]:
        """``(W0, D)``, both float32 [d_in, d_out]."""
        w0, update = self._teacher
        return w0.astype(np.float32), update.astype(np.float32)

    @functools.cached_property
    def _teacher(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.task_seed, 1])
        n, m, k = self.d, self._d_out, self.k
        w0 = rng.standard_normal((n, m)) / np.sqrt(n)
        if self.base_rank is not None:
            u, s, vt = np.linalg.svd(w0, full_matrices=False)
            w0 = (u[:, : self.base_rank] * s[: self.base_rank]) @ vt[: self.base_rank]
        if self.structure == "low_rank":
            update = rng.standard_normal((n, k)) @ rng.standard_normal((k, m))
        elif self.structure == "output_side":
            update = w0 @ rng.standard_normal((m, k)) @ rng.standard_normal((k, m))
        elif self.structure == "singular_values":
            u, _, vt = np.linalg.svd(w0, full_matrices=False)
            update = (u[:, :k] * rng.standard_normal(k)) @ vt[:k]
        elif self.structure == "kronecker":
            p, q = near_square(n), near_square(m)
            shapes = ((p, q), (n // p, m // q))
            update = sum(np.kron(*(rng.standard_normal(s) for s in shapes)) for _ in range(k))
        else:
            update = np.zeros((n, m))
            for b in range(k):
                rows, columns = (slice(b * size // k, (b + 1) * size // k) for size in (n, m))
                update[rows, columns] = rng.standard_normal((n // k, m // k))
        norm = np.linalg.norm(update) or 1.0
        return w0, update * (self.scale * np.linalg.norm(w0) / norm)

    def covariance(self) -> np.ndarray:
        """The diagonal [d_in] of the inputs' covariance."""
        return np.logspace(0, -np.log10(self.condition), self.d)

    def floor(self, rank: int) -> float:
        """The least mean squared error of any update of the given rank.

        ``sum_{i > rank} s_i(C^(1/2) D)^2 / d_out + noise^2`` (Eckart-Young in the norm of the
        inputs).
        """
        _, update = self._teacher
        weighted = np.sqrt(self.covariance())[:, None] * update
        s = np.linalg.svd(weighted, compute_uv=False)
        s = np.where(s > s[0] * 1e-12, s, 0.0)
        return float(np.sum(s[rank:] ** 2) / self._d_out + self.noise**2)

    def _sample(self, rng: np.random.Generator, count: int) -> Batch:
        w0, update = self._teacher
        x = rng.standard_normal((count, self.d)) * np.sqrt(self.covariance())
        y = x @ (w0 + update) + self.noise * rng.standard_normal((count, self._d_out))
        return _float32(x, y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sine:
    """Fit ``y = sin(2 pi x) + cosine * cos(3 pi x)`` on [-1, 1] from noisy points.

    ``cosine=0`` is the pretraining task and ``cosine=0.3`` the one to adapt to in the toy of
    arXiv 2409.15371, appendix C. Batches: ``x`` and ``y`` [B, 1], ``weight`` [B], float32.

    Attributes:
        cosine: weight of the second term.
        noise: standard deviation on the training points; evaluation is clean.
        train_points, eval_points: drawn uniformly, and evenly spaced.
        task_seed: of the training points.
    """

    cosine: float = 0.0
    noise: float = 0.05
    train_points: int = 50
    eval_points: int = 100
    task_seed: int = 0

    def curve(self, x: np.ndarray) -> np.ndarray:
        """The clean function."""
        return np.sin(2 * np.pi * x) + self.cosine * np.cos(3 * np.pi * x)

    def train(
        self,
        tokenizer: Any = None,
        batch_size: int = 50,
        seed: int = 0,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.IterDataset:
        """Shuffled batches of the training points, repeated."""
        rng = np.random.default_rng(self.task_seed)
        x = rng.uniform(-1, 1, (self.train_points, 1))
        rows = _float32(x, self.curve(x) + self.noise * rng.standard_normal(x.shape))
        points = grain.MapDataset.range(self.train_points).map(
            lambda i: {name: value[int(i)] for name, value in rows.items()}
        )
        return pipeline.training_batches(points, batch_size=batch_size, seed=seed, shard=shard)

    def evaluation(
        self,
        tokenizer: Any = None,
        batch_size: int = 100,
        max_batches: int | None = None,
        shard: pipeline.Shard = (0, 1),
    ) -> grain.MapDataset:
        """Evenly spaced clean points."""
        x = np.linspace(-1, 1, self.eval_points)[:, None]
        return array_evaluation(_float32(x, self.curve(x)), batch_size, max_batches, shard)


def near_square(n: int) -> int:
    """The largest divisor of n that is at most its square root.

    >>> near_square(12), near_square(7)
    (3, 1)
    """
    return next(p for p in range(int(n**0.5), 0, -1) if n % p == 0)


def _float32(x: np.ndarray, y: np.ndarray) -> Batch:
    rows = {"x": x, "y": y, "weight": np.ones(len(x))}
    return {name: value.astype(np.float32) for name, value in rows.items()}
