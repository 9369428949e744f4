"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows with left-aligned columns, a rule under the first.

    >>> print(columns([("path", "rank"), ("a/kernel", "4")]))
    path      rank
    --------  ----
    a/kernel  4
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
