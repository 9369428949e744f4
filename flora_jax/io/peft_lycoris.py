"""HF PEFT's LOHA and LOKR: layouts, reading and writing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flora_jax.adapters import LoHa, LoKr
from flora_jax.core.errors import FormatError, PlanError
from flora_jax.core.spec import KernelSpec
from flora_jax.io.peft_config import PeftConfig, is_number
from flora_jax.io.peft_export import Arrays, Keys, Row, common, patterns, write
from flora_jax.io.peft_layouts import Layout
from flora_jax.io.peft_methods import Reader, Site, read
from flora_jax.io.peft_modules import Model

RANK_AXES = {"a": (-1,), "b": (-2,), "c": (-2, -1), "w": ()}
"""First letter of an array's name to its axes of length r."""


def _matrix(ours: str, suffix: str, rows: int, cols: int) -> Layout:
    """A file's ``(rows, cols)``, ours transposed."""
    return Layout(ours, suffix, (rows, cols), (1, 0), (cols, rows))


def _windowed(
    ours: str, suffix: str, lead: tuple[int, int], window: tuple[int, ...], *, flat: bool
) -> Layout:
    """A file's ``(x, y, *window)``, ``(x, y * window)`` if flat; ours ``(window * y, x)``."""
    x, y = lead
    taps = math.prod(window)
    shape = (x, y * taps) if flat else (x, y, *window)
    axes = (*range(2, 2 + len(window)), 1, 0)
    return Layout(ours, suffix, shape, axes, (taps * y, x), (x, y, *window))


def _core(ours: str, suffix: str, rank: int, window: tuple[int, ...]) -> Layout:
    """A file's ``(r out, r in, kh, kw)``, in 1-D ``kw = 1``; ours ``(*window, r in, r out)``."""
    plane = (*window, 1)[:2]
    return Layout(ours, suffix, (rank, rank, *plane), (2, 3, 1, 0), (*window, rank, rank))


def loha(adapter: LoHa, spec: KernelSpec, shape: tuple[int, ...]) -> list[Layout]:
    """``w_a (out, r)``, ``w_b (r, in * window)``; with cores ``w_a (r, out)``, ``w_b (r, in)``."""
    n_in, n_out = spec.canonical_shape(shape)
    window, r = spec.spatial(shape), adapter.rank
    channels = n_in // math.prod(window)
    table = []
    for i in "12":
        a, b = f"hada_w{i}_b", f"hada_w{i}_a"
        if adapter.has_cores(spec, shape):
            table.append(_core(f"core{i}", f"hada_t{i}", r, window))
            table.append(_matrix(f"a{i}", a, r, channels))
            table.append(Layout(f"b{i}", b, (r, n_out), (0, 1), (r, n_out)))
        else:
            table.append(_windowed(f"a{i}", a, (r, channels), window, flat=True))
            table.append(_matrix(f"b{i}", b, n_out, r))
    return table


def lokr(adapter: LoKr, spec: KernelSpec, shape: tuple[int, ...]) -> list[Layout]:
    """``w1 (n, m)`` or ``w1_a (n, r)``, ``w1_b (r, m)``; ``w2 (q, p, *window)`` or its factors."""
    form, r = adapter.form(spec, shape), adapter.rank
    if form.low1:
        table = [_matrix("b1", "lokr_w1_a", form.n, r), _matrix("a1", "lokr_w1_b", r, form.m)]
    else:
        table = [_matrix("w1", "lokr_w1", form.n, form.m)]
    if form.core:
        table.append(_core("core2", "lokr_t2", r, form.window))
        table.append(Layout("b2", "lokr_w2_a", (r, form.q), (0, 1), (r, form.q)))
        table.append(_matrix("a2", "lokr_w2_b", r, form.p))
    elif form.low2:
        table.append(_matrix("b2", "lokr_w2_a", form.q, r))
        table.append(_windowed("a2", "lokr_w2_b", (r, form.p), form.window, flat=True))
    else:
        table.append(_windowed("w2", "lokr_w2", (form.q, form.p), form.window, flat=False))
    return table


def layouts(adapter: LoHa | LoKr, spec: KernelSpec, shape: tuple[int, ...]) -> list[Layout]:
    """The tensors of one module.

    Raises:
      PlanError: PEFT has no layer for the window, or scrambles it.
    """
    window = spec.spatial(shape)
    if len(window) > 2:
        raise PlanError(f"PEFT's LoHa and LoKr have no {len(window)}-D convolution")
    if isinstance(adapter, LoHa):
        return loha(adapter, spec, shape)
    if len(window) == 1 and not adapter.form(spec, shape).low2:
        # torch.kron pads the shorter shape in front, so the window meets the wrong axis.
        raise PlanError(
            f"PEFT's LoKr of a 1-D convolution is not a Kronecker product when r={adapter.rank} "
            "leaves lokr_w2 full; a smaller rank is"
        )
    return lokr(adapter, spec, shape)


def check_lycoris(config: PeftConfig) -> None:
    """``decompose_factor`` is a whole number."""
    factor = config.values.get("decompose_factor", -1)
    if not is_number(factor) or int(factor) != factor:
        raise FormatError(f"{config.where}: decompose_factor={factor!r} is not a whole number")


class LycorisReader(Reader):
    """LoHa and LoKr. Their rank and module dropout act while PEFT trains; they are not read."""

    def adapter(self, name: str) -> LoHa | LoKr:
        """The adapter that the configuration gives one module."""
        config = self.config
        options: dict[str, Any] = {
            "rank": int(config.patterned(name, "r", 8, "rank_pattern")),
            "alpha": float(config.patterned(name, "alpha", 8, "alpha_pattern")),
            "effective_conv": bool(config["use_effective_conv2d"]),
        }
        if config.method == "LOHA":
            return LoHa(**options)
        return LoKr(
            **options,
            decompose_both=bool(config["decompose_both"]),
            decompose_factor=int(config.values.get("decompose_factor", -1)),
            initializer="lycoris" if config["init_weights"] == "lycoris" else "peft",
        )

    def read(self, site):
        adapters = {layer: self.adapter(name) for layer, name in site.names.items()}
        widest = max(adapters.values(), key=lambda adapter: adapter.rank)
        rows = {}
        for layer, own in adapters.items():
            rows[layer] = self._row(site, layer, own, widest)
            if set(rows[layer]) != set(next(iter(rows.values()))):
                raise PlanError(
                    f"{site.path}: ranks {sorted({a.rank for a in adapters.values()})} of its "
                    "layers give LoKr factors of different kinds; load the base unrolled"
                )
        like = next(iter(rows.values()))
        for layer in site.layers:
            rows.setdefault(layer, {name: np.zeros_like(array) for name, array in like.items()})
        return widest, site.stack(rows)

    def _row(self, site: Site, layer: int | None, own: Any, widest: Any) -> Arrays:
        try:
            own.check(site.spec, site.shape)
            table = layouts(own, site.spec, site.shape)
        except PlanError as error:
            raise PlanError(f"{site.path}: {error}") from None
        arrays = read(self.source, site, layer, table)
        scaled, ratio = "w1" if "w1" in arrays else "b1", own.scale / widest.scale
        if ratio != 1.0:
            arrays[scaled] = (arrays[scaled] * ratio).astype(arrays[scaled].dtype)
        return {name: _pad(name, array, widest.rank) for name, array in arrays.items()}


def _pad(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    """An array widened with zeros to a rank."""
    widths = [(0, 0)] * array.ndim
    for axis in RANK_AXES[name[0]]:
        widths[axis] = (0, rank - array.shape[axis])
    return np.pad(array, widths)


def _export(rows: Sequence[Row], model: Model) -> Keys:
    """Fills the rows' tensors; the configuration that LoHa and LoKr share.

    A layer of a stack whose arrays are all zero has no adapter in the file.
    """
    ranks, alphas = {}, {}
    for row in rows:
        if row.layer is not None and not any(np.any(a) for a in row.arrays.values()):
            continue
        adapter, shape = row.entry.adapter, row.entry.kernel_shape
        try:
            table = layouts(adapter, row.entry.spec.unstacked(), shape)
        except PlanError as error:
            raise PlanError(f"{row.entry.path}: {error}") from None
        write(row, table, row.arrays)
        whole = float(adapter.alpha).is_integer()
        ranks[row.name] = adapter.rank
        alphas[row.name] = int(adapter.alpha) if whole else adapter.alpha
    if not ranks:
        raise PlanError("every adapter of the plan is zero: nothing to save")
    windowed = [row for row in rows if row.entry.spec.window(row.entry.kernel_shape) > 1]
    effective = lambda row: row.entry.adapter.effective_conv
    r, rank_pattern = patterns(ranks, model)
    alpha, alpha_pattern = patterns(alphas, model)
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_effective_conv2d": bool(windowed)
        and common(windowed, "use_effective_conv2d", effective),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }


def export_loha(rows: list[Row], model: Model) -> tuple[Arrays, Keys]:
    """LoHa as ``hada_w1_a ... hada_w2_b`` (and ``hada_t1, hada_t2``)."""
    return {}, _export(rows, model)


def export_lokr(rows: list[Row], model: Model) -> tuple[Arrays, Keys]:
    """LoKr as ``lokr_w1`` and ``lokr_w2`` or their factors."""
    ways = {row.entry.adapter.initializer for row in rows}
    return {}, _export(rows, model) | {
        "decompose_both": common(rows, "decompose_both", lambda r: r.entry.adapter.decompose_both),
        "decompose_factor": common(
            rows, "decompose_factor", lambda r: r.entry.adapter.decompose_factor
        ),
        "init_weights": "lycoris" if ways == {"lycoris"} else True,
    }
