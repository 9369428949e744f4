"""What a conversion kept of each weight, as rows and as a table."""

from __future__ import annotations

import dataclasses

from flora_jax.core.errors import PlanError
from flora_jax.core.paths import nearest
from flora_jax.core.text import columns


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight; of a scanned stack the worst layer.

    Args:
      path: of the weight.
      form: ``lora`` or ``replace``.
      rank: of the LoRA; 0 for a replaced leaf.
      exact: whether no singular value was cut and nothing was rounded by a random sketch.
      error: ``|dW - kept| / |dW|`` (Frobenius).
      energy: ``1 - error^2``, the share of ``|dW|^2`` that is kept.
      bias: whether the layer's bias changes too (always exact).
    """

    path: str
    form: str
    rank: int
    exact: bool
    error: float
    bias: bool = False

    @property
    def energy(self) -> float:
        return 1.0 - self.error**2


@dataclasses.dataclass(frozen=True)
class Report:
    """One row a weight, in path order."""

    rows: tuple[Row, ...]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        for row in self.rows:
            if row.path == path:
                return row
        near = ", ".join(nearest(path, [row.path for row in self.rows]))
        raise PlanError(f"the report has no {path!r}; nearest: {near}")

    @property
    def error(self) -> float:
        """The largest relative error."""
        return max((row.error for row in self.rows), default=0.0)

    def table(self) -> str:
        """Text table: path, form, rank, relative error, energy kept."""
        rows = [("path", "form", "rank", "error", "energy kept")]
        for row in self.rows:
            form = row.form + (" + bias" if row.bias else "")
            error = "exact" if row.exact else f"{row.error:.2e}"
            rows.append((row.path, form, str(row.rank or "-"), error, f"{100 * row.energy:.3f} %"))
        return columns(rows) + f"\n{len(self)} weights, largest error {self.error:.2e}"
