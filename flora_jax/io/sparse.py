"""Sparse deltas: the entries of a model that training changed, as indices and new values.

What an optimizer that moves few entries (LIFT) leaves behind is a few numbers, not a model:
``sparse_delta(base, params)`` finds them by their bits, ``apply_delta`` writes them into the base
again, exactly.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core import paths
from flora_jax.core.errors import FormatError, StructureError
from flora_jax.core.leaf import WeightLeaf, is_leaf
from flora_jax.io import safetensors

FORMAT, VERSION = "flora_jax.sparse_delta", "1"


class Entries(NamedTuple):
    """Changed entries of one array: ``indices`` into its flattened form, ascending; ``values``."""

    indices: np.ndarray
    values: np.ndarray


def sparse_delta(base: Any, params: Any) -> dict[str, Entries]:
    """``{path: (indices, values)}`` of every array of ``params`` that differs from ``base``.

    Entries are compared by their bits. ``indices`` are int32 (int64 for arrays of 2^31 entries and
    more), ``values`` have the dtype of ``params``.

    Args:
      base: the parameters before.
      params: the same tree after, e.g. ``flora.materialize(bound)``.

    Raises:
      StructureError: other paths, shapes or dtypes; a low-bit weight that changed.
    """
    before, after = (paths.flatten(tree, is_leaf=is_leaf) for tree in (base, params))
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))[0]
        raise StructureError(f"{odd} is only in {'the base' if odd in before else 'params'}")
    delta = {}
    for path, old in before.items():
        new = after[path]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise StructureError(
                f"{path}: {new.dtype}{new.shape} after {old.dtype}{old.shape}: a delta keeps both"
            )
        if isinstance(old, WeightLeaf) or isinstance(new, WeightLeaf):
            parts = [jax.tree.leaves(leaf) for leaf in (old, new)]
            if type(old) is not type(new) or any(_changed(*pair).size for pair in zip(*parts)):
                raise StructureError(f"{path}: a {type(new).__name__} has no sparse delta")
            continue
        changed = _changed(old, new)
        if changed.size:
            values = np.asarray(jax.device_get(new)).reshape(-1)[changed]
            delta[path] = Entries(changed.astype(_index_dtype(new.size)), values)
    return delta


def _changed(old: Any, new: Any) -> np.ndarray:
    """Flat indices of the entries whose bits differ."""
    old, new = (np.asarray(jax.device_get(x)).reshape(-1) for x in (old, new))
    word = np.dtype(f"u{new.dtype.itemsize}")
    return np.flatnonzero(old.view(word) != new.view(word))


def apply_delta(base: Any, delta: Mapping[str, Entries]) -> Any:
    """``base`` with the entries of a delta written into it; untouched arrays are shared.

    Raises:
      StructureError: a path the base lacks, an index out of range, another dtype.
    """
    flat = paths.flatten(base, is_leaf=is_leaf)
    new = {}
    for path, (indices, values) in delta.items():
        leaf = _target(path, flat, values.dtype)
        if len(indices) and not 0 <= indices[0] <= indices[-1] < leaf.size:
            raise StructureError(f"{path}: index {indices[-1]} is outside of shape {leaf.shape}")
        array = np.array(jax.device_get(leaf)).reshape(-1)
        array[indices] = values
        new[path] = jnp.asarray(array.reshape(leaf.shape))
    return paths.map_with_path(lambda path, leaf: new.get(path, leaf), base, is_leaf=is_leaf)


def _target(path: str, flat: Mapping[str, Any], dtype: Any) -> Any:
    """The base's array that a delta of ``path`` goes into."""
    if path not in flat:
        near = ", ".join(paths.nearest(path, flat))
        raise StructureError(f"the base has no {path!r}; nearest: {near}")
    leaf = flat[path]
    if isinstance(leaf, WeightLeaf) or leaf.dtype != dtype:
        raise StructureError(f"{path}: the delta is {dtype}, the base {leaf.dtype}")
    return leaf


def save_delta(path: str | Path, base: Any, delta: Mapping[str, Entries]) -> None:
    """One safetensors file, atomically; see docs/formats.md.

    Args:
      base: what the delta was taken from; the file keeps a checksum of the arrays it changes.

    Raises:
      StructureError: a path the base lacks, or of another dtype there.
    """
    flat = paths.flatten(base, is_leaf=is_leaf)
    arrays = {p: _target(p, flat, entries.values.dtype) for p, entries in delta.items()}
    tensors = {f"{p}/{name}": a for p, e in delta.items() for name, a in e._asdict().items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "shapes": json.dumps({p: list(x.shape) for p, x in arrays.items()}),
        "base_crc32": json.dumps({p: _crc(x) for p, x in arrays.items()}),
    }
    safetensors.save_one(path, tensors, metadata)


def load_delta(path: str | Path, base: Any) -> dict[str, Entries]:
    """``{path: (indices, values)}`` of a file, checked as a whole against the base it is for.

    Raises:
      FormatError: not such a file, of another version or another base, or of indices that are not
        ascending and within the shape.
      StructureError: a path the base lacks, or of another dtype there.
    """
    files = safetensors.TensorFiles(path)
    found = files.metadata.get("format"), files.metadata.get("version")
    if found != (FORMAT, VERSION):
        raise FormatError(f"{path}: format {found[0]!r} version {found[1]!r} is not {FORMAT} 1")
    try:
        shapes, sums = (json.loads(files.metadata[key]) for key in ("shapes", "base_crc32"))
        shapes = {p: tuple(map(int, shape)) for p, shape in shapes.items()}
        sums = {p: int(sums[p]) for p in shapes}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: its metadata has no shapes or checksums: {error!r}") from None
    wanted = {f"{p}/{name}" for p in shapes for name in Entries._fields}
    if wanted != set(files):
        odd = sorted(wanted ^ set(files))[0]
        raise FormatError(f"{path}: {odd} is {'missing' if odd in wanted else 'not in shapes'}")
    flat = paths.flatten(base, is_leaf=is_leaf)
    delta = {}
    for name, shape in shapes.items():
        entries = Entries(*(files[f"{name}/{field}"] for field in Entries._fields))
        _check(f"{path}: {name}", entries, shape)
        leaf = _target(name, flat, entries.values.dtype)
        if tuple(leaf.shape) != shape or _crc(leaf) != sums[name]:
            raise FormatError(f"{path}: {name} is a change of another base")
        delta[name] = entries
    return delta


def _check(where: str, entries: Entries, shape: tuple[int, ...]) -> None:
    indices, values = entries
    if indices.ndim != 1 or indices.shape != values.shape:
        raise FormatError(f"{where}: {indices.shape} indices for {values.shape} values")
    if indices.dtype != _index_dtype(math.prod(shape)):
        raise FormatError(f"{where}: indices of a {shape} array are not {indices.dtype}")
    ascending = bool((np.diff(indices) > 0).all())
    if len(indices) and not (ascending and indices[0] >= 0 and indices[-1] < math.prod(shape)):
        raise FormatError(f"{where}: indices must ascend within the {math.prod(shape)} entries")


def _index_dtype(size: int) -> np.dtype:
    return np.dtype(np.int32 if size < 2**31 else np.int64)


def _crc(array: Any) -> int:
    data = np.ascontiguousarray(jax.device_get(array))
    return zlib.crc32(data.reshape(-1).view(np.uint8))
