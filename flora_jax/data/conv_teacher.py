"""A synthetic regression task for convolutions: an update of known multilinear ranks."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data.generated import Generated
from flora_jax.data.packing import Batch

CORES = ("orthogonal", "gaussian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvTeacherStudent(Generated):
    """Learn ``y = conv(x, W0 + D) + noise`` from a known W0, where D is a small Tucker product.

    ``D = core x_1 A_1 ... x_4 A_4`` with a random core and orthonormal random factors, in the order
    of the kernel's axes ``(kh, kw, in, out)``. Stride 1 and ``VALID`` padding: every patch of
    ``x ~ N(0, I)`` is white, so that errors have closed forms. Batches: ``x`` [B, size, size, in],
    ``y`` [B, size-kh+1, size-kw+1, out], ``weight`` [B], float32.

    Example (flattened to a matrix, an update of ranks (1, 1, 2, 2) has rank 2):
        >>> task = ConvTeacherStudent(ranks=(1, 1, 2, 2))
        >>> _, update = task.teacher()
        >>> update.shape, round(task.floor(1) / task.floor(0), 6), task.floor(2) < 1e-12
        ((3, 3, 16, 32), 0.5, True)

    Attributes:
        shape: of the kernel.
        ranks: of D, one per axis.
        core: ``orthogonal``: the singular values of D, flattened to (kh kw in, out), are equal;
            ``gaussian``: independent entries, and often one value far above the others.
        size: side of the images.
        scale: Frobenius norm of D relative to that of W0.
        noise: standard deviation of the noise on y.
        task_seed: of W0 and D, apart from the training seed.
        eval_size: examples of the evaluation.
    """

    shape: tuple[int, int, int, int] = (3, 3, 16, 32)
    ranks: tuple[int, int, int, int] = (1, 1, 2, 2)
    core: str = "orthogonal"
    size: int = 8
    scale: float = 0.5
    noise: float = 0.0
    task_seed: int = 0
    eval_size: int = 256

    def __post_init__(self) -> None:
        for axis, (rank, length) in enumerate(zip(self.ranks, self.shape)):
            most = min(length, math.prod(self.ranks) // max(rank, 1))
            if not 1 <= rank <= most:
                raise ConfigError(
                    f"rank {rank} of axis {axis} of {self.ranks} must be between 1 and {most}"
                )
        if self.core not in CORES:
            raise ConfigError(unknown("core", self.core, CORES))
        if self.size < max(self.shape[:2]):
            raise ConfigError(f"size={self.size} is smaller than the window {self.shape[:2]}")

    def teacher(self) -> tuple[np.ndarray, np.ndarray]:
        """``(W0, D)``, both float32 [kh, kw, in, out]."""
        w0, update = self._teacher
        return w0.astype(np.float32), update.astype(np.float32)

    @functools.cached_property
    def _teacher(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.task_seed, 1])
        w0 = rng.standard_normal(self.shape) / math.sqrt(math.prod(self.shape[:3]))
        factors = [
            np.linalg.qr(rng.standard_normal((n, j)))[0] for n, j in zip(self.shape, self.ranks)
        ]
        core = rng.standard_normal(self.ranks)
        if self.core == "orthogonal":
            flat = np.linalg.qr(core.reshape(-1, self.ranks[3]))[0]
            core = flat.reshape(self.ranks)
        update = np.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
        return w0, update * (self.scale * np.linalg.norm(w0) / np.linalg.norm(update))

    def floor(self, rank: int) -> float:
        """The least mean squared error of an update whose flattened matrix has the given rank.

        ``sum_{i > rank} s_i^2 / out + noise^2``, s the singular values of D as (kh kw in, out).
        """
        s = np.linalg.svd(self._teacher[1].reshape(-1, self.shape[3]), compute_uv=False)
        return float(np.sum(s[rank:] ** 2) / self.shape[3] + self.noise**2)

    def _sample(self, rng: np.random.Generator, count: int) -> Batch:
        kernel = np.add(*self.teacher())
        x = rng.standard_normal((count, self.size, self.size, self.shape[2]), np.float32)
        # [B, h, w, in, kh, kw]: the window axes come last
        patches = np.lib.stride_tricks.sliding_window_view(x, self.shape[:2], axis=(1, 2))
        y = np.tensordot(patches, kernel.transpose(2, 0, 1, 3), axes=3)
        y = y + np.float32(self.noise) * rng.standard_normal(y.shape, np.float32)
        return {"x": x, "y": y, "weight": np.ones(count, np.float32)}
