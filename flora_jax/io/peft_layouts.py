"""Tensor layouts of HF-PEFT methods against ours, one table used for reading and writing."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flora_jax.core.errors import PlanError
from flora_jax.core.spec import KernelSpec
from flora_jax.io.peft_config import PeftType


class Layout(NamedTuple):
    """One array of an unstacked adapter.

    Args:
      ours: its name in our tree.
      suffix: what follows the module's name in the file.
      shape: in the file.
      axes: transposition of the file's array; then it is reshaped to ``flat``.
      flat: our shape.
      parts: what the file's array is reshaped to before that, where it holds merged axes.
    """

    ours: str
    suffix: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    flat: tuple[int, ...]
    parts: tuple[int, ...] = ()

    def read(self, array: np.ndarray) -> np.ndarray:
        """The file's array in our layout."""
        array = np.asarray(array).reshape(self.parts or self.shape)
        return array.transpose(self.axes).reshape(self.flat)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Our array in the file's layout."""
        parts = self.parts or self.shape
        moved = np.asarray(array).reshape([parts[axis] for axis in self.axes])
        return np.ascontiguousarray(moved.transpose(np.argsort(self.axes)).reshape(self.shape))


def check_spec(path: str, spec: KernelSpec, form: PeftType) -> None:
    """Raise PlanError for a kernel that PEFT's method has no layer for."""
    kinds = form.kinds
    plain = len(spec.out_axes) == 1 and (spec.kind != "dense" or len(spec.in_axes) == 1)
    if spec.kind not in kinds or spec.batched or not plain:
        groups = f" with {spec.groups} groups" if spec.groups > 1 else ""
        raise PlanError(
            f"{path}: a {spec.kind} weight{groups} has no HF-PEFT {form.name} layer; those have: "
            f"{', '.join(kinds)} (without batch axes or groups)"
        )


def lora(
    spec: KernelSpec, shape: tuple[int, ...], rank: int, *, bias: bool = False, dora: bool = False
) -> list[Layout]:
    """LoRA and DoRA: ``A (r, in, *window)``, ``B (out, r, *1)``, embedding ``A``, ``B`` bare.

    Args:
      shape: our unstacked kernel shape.
    """
    n_in, n_out = spec.canonical_shape(shape)
    window = spec.spatial(shape)
    channels = n_in // math.prod(window)
    names = ("lora_A.weight", "lora_B.weight")
    if spec.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    order = (*range(2, 2 + len(window)), 1, 0)
    ones = (1,) * len(window)
    rows = [
        Layout("a", names[0], (rank, channels, *window), order, (n_in, rank)),
        Layout("b", names[1], (n_out, rank, *ones), order, (rank, n_out)),
    ]
    if bias:
        rows.append(Layout("bias", "lora_B.bias", (n_out,), (0,), (n_out,)))
    if dora:
        m = (1, n_out, *ones) if window else (n_out,)
        rows.append(Layout("m", "lora_magnitude_vector", m, tuple(range(len(m))), (n_out,)))
    return rows


def ia3(spec: KernelSpec, shape: tuple[int, ...], scale: str) -> list[Layout]:
    """IA3: ``(out, 1)``, feed-forward ``(1, in)``; a convolution's ``(1, channels, *1)``."""
    n_in, n_out = spec.canonical_shape(shape)
    window = spec.spatial(shape)
    n = n_out if scale == "output" else n_in // math.prod(window)
    ones = (1,) * len(window)
    file = (1, n, *ones) if window else (n, 1) if scale == "output" else (1, n)
    return [Layout("l", "ia3_l", file, tuple(range(len(file))), (n,))]


def vera(spec: KernelSpec, shape: tuple[int, ...], rank: int) -> list[Layout]:
    """VeRA's trained vectors; the shared projections belong to the whole file."""
    _, n_out = spec.canonical_shape(shape)
    return [
        Layout("d", "vera_lambda_d", (rank,), (0,), (rank,)),
        Layout("b", "vera_lambda_b", (n_out,), (0,), (n_out,)),
    ]
