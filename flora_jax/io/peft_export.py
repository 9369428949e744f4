"""From adapters of ours to the tensors and configuration keys of HF-PEFT methods."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from flora_jax.adapters import KORE, DoRA, LoRA, OLoRA, PiSSA, VeRA
from flora_jax.core.adapter import PRNG
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.plan import Entry
from flora_jax.io import peft_layouts as layouts
from flora_jax.io.peft_config import PREFIX
from flora_jax.io.peft_modules import Model, shortest

Arrays = dict[str, np.ndarray]
Keys = dict[str, Any]


@dataclasses.dataclass
class Row:
    """One adapted torch module.

    Args:
      name: the module's.
      arrays: ours, of one layer.
      file: suffix to tensor, filled by the exporter; stays empty for a layer without adapter.
    """

    name: str
    entry: Entry
    layer: int | None
    arrays: Arrays
    file: Arrays = dataclasses.field(default_factory=dict)


def common(rows: Sequence[Row], what: str, value: Any) -> Any:
    """A setting that PEFT has once per adapter.

    Raises:
      PlanError: two weights differ in it.
    """
    found: dict[Hashable, str] = {}
    for row in rows:
        found.setdefault(value(row), row.entry.path)
    if len(found) > 1:
        rows_ = ", ".join(f"{v!r} at {path}" for v, path in found.items())
        raise PlanError(f"a PEFT adapter has one {what}; the plan has {rows_}")
    return next(iter(found))


def acting(rows: Sequence[Row]) -> list[Row]:
    """The rows without the layers of a stack whose arrays are zero, unless all of them are.

    For methods that are the identity at zero: such a layer is written as one without adapter.
    """
    moved = [row for row in rows if row.layer is None or any(map(np.any, row.arrays.values()))]
    return moved or list(rows)


def write(row: Row, table: list[layouts.Layout], arrays: Arrays) -> None:
    """Fill a row's tensors from our arrays."""
    row.file = {layout.suffix: layout.write(arrays[layout.ours]) for layout in table}


def export_lora(rows: list[Row], model: Model) -> tuple[Arrays, Keys]:
    """LoRA, DoRA, EVA, PiSSA, OLoRA and KORE as ``lora_A``, ``lora_B`` (and magnitudes)."""
    for row in rows:
        if isinstance(row.entry.adapter, KORE):
            _kore_as_lora(row)
    dora = common(rows, "use_dora", lambda row: isinstance(row.entry.adapter, DoRA))
    bias = _lora_bias(rows, model)
    plain = [row for row in rows if row.entry.spec.kind != "embedding"]
    dropout = common(plain or rows, "lora_dropout", lambda row: row.entry.adapter.dropout)
    flags = {row.entry.adapter.rslora for row in rows}
    rslora = flags == {True}
    ranks, alphas = {}, {}
    for row in rows:
        adapter, spec = row.entry.adapter, row.entry.spec.unstacked()
        arrays = _trim(row, _difference(row))
        rank = arrays["a"].shape[1]
        if rank == 0:
            continue
        table = layouts.lora(spec, row.entry.kernel_shape, rank, bias=bias, dora=dora)
        write(row, table, arrays)
        ranks[row.name], alphas[row.name] = rank, _alpha(adapter, rank, rslora)
    if not ranks:
        raise PlanError("every adapter of the plan is zero: nothing to save")
    r, rank_pattern = patterns(ranks, model)
    alpha, alpha_pattern = patterns(alphas, model)
    return {}, {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_bias": bias,
        "lora_dropout": dropout,
        "init_lora_weights": True,
        "bias": "none",
    }


def _lora_bias(rows: list[Row], model: Model) -> bool:
    """PEFT's ``lora_bias``, which all modules share: those without one of ours get zeros.

    Raises:
      PlanError: some have one, and a module's layer has no bias to merge zeros into.
    """
    lacking = [row for row in rows if not row.entry.adapter.use_bias]
    unbiased = any("bias" not in model.modules[row.name].leaves for row in lacking)
    if unbiased or len(lacking) == len(rows):
        return common(rows, "lora_bias", lambda row: row.entry.adapter.use_bias)
    for row in lacking:
        *batch, _, n_out = row.entry.spec.unstacked().canonical_shape(row.entry.kernel_shape)
        row.arrays = row.arrays | {"bias": np.zeros(math.prod(batch) * n_out, np.float32)}
    return True


def tie_lora(tensors: Arrays, original: str, copy: str) -> Arrays:
    """A tied head's ``A, B`` are the embedding's ``B^T, A^T``."""
    a, b = (tensors[f"{PREFIX}{original}.lora_embedding_{x}"] for x in "AB")
    if f"{PREFIX}{original}.lora_magnitude_vector" in tensors:
        raise PlanError(f"{original}: DoRA has no PEFT form where {copy} is tied to it")
    twins = {"lora_A": b.T, "lora_B": a.T}
    return {f"{PREFIX}{copy}.{n}.weight": np.ascontiguousarray(m) for n, m in twins.items()}


def _alpha(adapter: LoRA, rank: int, rslora: bool) -> int | float:
    """The alpha that gives the adapter's scale at a rank; whole numbers as integers."""
    if rank == adapter.rank and rslora == adapter.rslora:
        alpha = adapter.alpha
    else:
        alpha = adapter.scale * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _kore_as_lora(row: Row) -> None:
    """``s a0 (b - b0)``: a LoRA of the same rank; of rank 2r where a trains too."""
    kore, arrays = row.entry.adapter, row.arrays
    if "b0" not in arrays:
        raise _folded(row.entry.path)
    wide = {name: arrays[name].astype(arrays["b"].dtype) for name in arrays}
    if kore.train_a:
        a = np.concatenate([wide["a"], wide["a0"]], axis=1)
        pair = {"a": a, "b": np.concatenate([wide["b"], -wide["b0"]], axis=0)}
    else:
        pair = {"a": wide["a0"], "b": wide["b"] - wide["b0"]}
    rank = pair["a"].shape[1]
    lora = LoRA(rank=rank, alpha=kore.scale * rank, dropout=kore.dropout)
    row.entry, row.arrays = dataclasses.replace(row.entry, adapter=lora), pair


def _folded(path: str) -> StructureError:
    return StructureError(
        f"{path}: a0 and b0 were folded into the base (flora_jax.rebase); save the "
        "adapters from before that, with a and b as trained"
    )


def _difference(row: Row) -> Arrays:
    """``s(a b - a0 b0)`` as one low-rank product ``[a, a0] [b; -b0]``."""
    arrays = row.arrays
    if not isinstance(row.entry.adapter, (PiSSA, OLoRA)):
        return arrays
    if "a0" not in arrays:
        raise _folded(row.entry.path)
    a0, b0 = (arrays[n].astype(arrays[n[0]].dtype) for n in ("a0", "b0"))
    a = np.concatenate([arrays["a"], a0], axis=1)
    return arrays | {"a": a, "b": np.concatenate([arrays["b"], -b0], axis=0)}


def _trim(row: Row, arrays: Arrays) -> Arrays:
    """Without the trailing rank components that are zero in this layer of a stack.

    They are the padding of a layer of smaller rank. A DoRA whose magnitudes moved, or a trained
    bias, keeps one component.
    """
    if row.layer is None:
        return arrays
    used = np.any(arrays["a"], axis=0) | np.any(arrays["b"], axis=1)
    rank = int(np.max(np.nonzero(used)[0], initial=-1)) + 1
    if rank == 0 and _acts(arrays):
        rank = 1
    return arrays | {"a": arrays["a"][:, :rank], "b": arrays["b"][:rank]}


def _acts(arrays: Arrays) -> bool:
    if "m" in arrays and not np.allclose(arrays["m"], np.sqrt(arrays["norm2"]), rtol=1e-6):
        return True
    return bool(np.any(arrays.get("bias", 0)))


def patterns(values: dict[str, Any], model: Model) -> tuple[Any, dict[str, Any]]:
    """The most common value, and ``{end of a module's name: value}`` of the others."""
    default = Counter(values.values()).most_common(1)[0][0]
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        wanted = [name for name, own in values.items() if own == value]
        pattern |= dict.fromkeys(shortest(wanted, values), value)
    return default, pattern


def export_ia3(rows: list[Row], model: Model) -> tuple[Arrays, Keys]:
    """IA3; the weights scaled at their input are the feed-forward modules."""
    for row in rows:
        spec = row.entry.spec.unstacked()
        write(row, layouts.ia3(spec, row.entry.kernel_shape, row.entry.adapter.scale), row.arrays)
    inputs = [row.name for row in rows if row.entry.adapter.scale == "input"]
    return {}, {"feedforward_modules": shortest(inputs, [r.name for r in rows], str.endswith)}


def export_vera(rows: list[Row], model: Model) -> tuple[Arrays, Keys]:
    """VeRA with one pair of projections for the whole file.

    Our own projections are drawn with the bound of each layer's input size, so layers differ by a
    factor, which goes into ``d``: ``(c A) diag(d) = A diag(c d)``.
    """
    rank = common(rows, "r", lambda row: row.entry.adapter.rank)
    dropout = common(rows, "vera_dropout", lambda row: row.entry.adapter.dropout)
    pairs = {row.name: _projections(row) for row in rows}
    a = max((pair[0] for pair in pairs.values()), key=len)
    b = max((pair[1] for pair in pairs.values()), key=lambda m: m.shape[1])
    for row in rows:
        own_a, own_b = pairs[row.name]
        factor = _factor(own_a, a[: len(own_a)], row.entry.path)
        if _factor(own_b, b[:, : own_b.shape[1]], row.entry.path) != 1.0:
            raise PlanError(f"{row.entry.path}: its projection b0 is not a slice of the largest")
        d = (row.arrays["d"] * factor).astype(row.arrays["d"].dtype)
        table = layouts.vera(row.entry.spec.unstacked(), row.entry.kernel_shape, rank)
        write(row, table, row.arrays | {"d": d})
    shared = {"base_model.vera_A": a.T, "base_model.vera_B": b.T}
    return {name: np.ascontiguousarray(array) for name, array in shared.items()}, {
        "r": rank,
        "vera_dropout": dropout,
        "d_initial": common(rows, "d_initial", lambda row: row.entry.adapter.d_initial),
        "save_projection": True,
        "projection_prng_key": 0,
        "bias": "none",
    }


def _projections(row: Row) -> tuple[np.ndarray, np.ndarray]:
    adapter: VeRA = row.entry.adapter
    if "a0" in row.arrays:
        return row.arrays["a0"], row.arrays["b0"]
    n_in, n_out = row.entry.spec.unstacked().canonical_shape(row.entry.kernel_shape)
    root = jax.random.key(adapter.seed, impl=PRNG)
    a, b = adapter.projections(root, n_in, n_out)
    return np.asarray(a), np.asarray(b)


def _factor(own: np.ndarray, shared: np.ndarray, path: str) -> float:
    """``c`` with ``own = c shared``; exactly 1 for equal matrices.

    Raises:
      PlanError: they are not multiples.
    """
    if np.array_equal(own, shared):
        return 1.0
    factor = float(np.linalg.norm(own) / np.linalg.norm(shared))
    if not np.allclose(own, factor * shared, rtol=1e-4, atol=1e-6):
        raise PlanError(f"{path}: its projections are not slices of the plan's largest pair")
    return factor
