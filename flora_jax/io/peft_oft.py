"""HF-PEFT's OFT on linear layers, square 2-D convolutions and embeddings."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import OFT
from flora_jax.core.errors import FormatError, PlanError
from flora_jax.core.spec import KernelSpec
from flora_jax.io.peft_config import PeftConfig, PeftType, keys
from flora_jax.io.peft_export import Row, acting, common, write
from flora_jax.io.peft_layouts import Layout
from flora_jax.io.peft_methods import Reader, Site, read
from flora_jax.io.peft_modules import Model

# The series of the Cayley transform changed its last term with this version.
SINCE = (0, 18)


@functools.lru_cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def adjust(n: int, wanted: int) -> int:
    """The divisor of n that PEFT takes instead of a block size or count that does not divide.

    The nearest; of two equally near ones the smaller.

    >>> adjust(48, 11), adjust(32, 11), adjust(6, 9)
    (12, 8, 6)
    """
    return min(_divisors(n), key=lambda d: (abs(d - wanted), d))


def rotated(path: str, spec: KernelSpec, shape: tuple[int, ...]) -> int:
    """The size of the axis that is rotated.

    Raises:
      PlanError: a convolution of another kind than PEFT's layer is for.
    """
    window = spec.spatial(shape)
    if window and (len(window) != 2 or window[0] != window[1]):
        raise PlanError(f"{path}: PEFT's OFT takes square 2-D windows, this one is {window}")
    return spec.canonical_shape(shape)[1 if spec.kind == "embedding" else 0]


def layout(spec: KernelSpec, shape: tuple[int, ...], adapter: OFT) -> list[Layout]:
    """``(blocks, b(b-1)/2)``; a shared block alone is ``(1, ..)``."""
    blocks, b = adapter.layout(spec, shape)
    stored = (1 if adapter.block_share else blocks, b * (b - 1) // 2)
    suffix = "oft_embedding_R.weight" if spec.kind == "embedding" else "oft_R.weight"
    return [Layout("skew", suffix, stored, (0, 1), stored)]


class OFTReader(Reader):
    """The size of a block follows from the module's own size."""

    def adapter(self, site: Site) -> OFT:
        """The adapter of one weight, its block size adjusted as PEFT does."""
        config, n = self.config, rotated(site.path, site.spec, site.shape)
        size, count = config.whole("oft_block_size", 32), config.whole("r", 0)
        series = config.values.get("use_cayley_neumann", True)
        return OFT(
            block_size=adjust(n, size) if size else n // adjust(n, count),
            block_share=bool(config["block_share"]),
            neumann_terms=config.whole("num_cayley_neumann_terms", 5) if series else 0,
            coft=bool(config["coft"]),
            eps=float(config.number("eps", 6e-5)),
            dropout=float(config.number("module_dropout", 0.0)),
        )

    def read(self, site):
        adapter = self.adapter(site)
        table = layout(site.spec, site.shape, adapter)
        rows = {layer: read(self.source, site, layer, table) for layer in site.names}
        like = next(iter(rows.values()))["skew"]
        for layer in site.layers:
            rows.setdefault(layer, {"skew": np.zeros_like(like)})
        return adapter, site.stack(rows)


def check_oft(config: PeftConfig) -> None:
    """Raise FormatError for files of older versions, whose tensors mean something else."""
    if "oft_block_size" not in config.values:
        raise FormatError(
            f"{config.where}: no oft_block_size: an OFT adapter from before PEFT 0.14 has another "
            "parametrisation"
        )
    size, count = config.whole("oft_block_size", 32), config.whole("r", 0)
    if (size > 0) == (count > 0) or min(size, count) < 0:
        raise FormatError(
            f"{config.where}: r={count} and oft_block_size={size}: exactly one is above 0"
        )
    version = str(config["peft_version"] or "0.0.0")
    found = re.match(r"(\d+)\.(\d+)", version)
    old = found is None or tuple(map(int, found.groups())) < SINCE
    if config.values.get("use_cayley_neumann", True) and old:
        raise FormatError(
            f"{config.where}: peft_version={version!r} with use_cayley_neumann: the series was "
            "another one before PEFT 0.18, such an adapter must be trained again"
        )


def _setting(rows: list[Row]) -> dict[str, int]:
    """``r`` and ``oft_block_size``, one of them 0, that PEFT adjusts to every weight's own.

    Raises:
      PlanError: there is none.
    """
    sizes = []
    for row in rows:
        spec, shape = row.entry.spec.unstacked(), row.entry.kernel_shape
        n = rotated(row.entry.path, spec, shape)
        sizes.append((n, row.entry.adapter.layout(spec, shape)[1], row.entry.path))
    pairs = {(n, b) for n, b, _ in sizes}
    for key, other, want in (
        ("oft_block_size", "r", pairs),
        ("r", "oft_block_size", {(n, n // b) for n, b in pairs}),
    ):
        values = [v for _, v in want]
        for value in range(min(values), max(values) + 1):
            if all(adjust(n, value) == v for n, v in want):
                return {key: value, other: 0}
    each = ", ".join(f"{b} of {n} at {path}" for n, b, path in dict.fromkeys(sizes))
    raise PlanError(f"no r or oft_block_size gives all these block sizes: {each}")


def export_oft(rows: list[Row], model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """OFT; with coft the projected values, which are what PEFT itself would hold."""
    setting = lambda name: common(rows, name, lambda row: getattr(row.entry.adapter, name))
    terms, coft = setting("neumann_terms"), setting("coft")
    config = _setting(rows) | {
        "block_share": setting("block_share"),
        "use_cayley_neumann": terms > 0,
        "num_cayley_neumann_terms": terms or 5,
        "coft": coft,
        "module_dropout": setting("dropout"),
        "init_weights": True,
        "peft_version": "0.18.0",
        "bias": "none",
    }
    if coft:
        config["eps"] = setting("eps")
    for row in acting(rows):
        entry, arrays = row.entry, row.arrays
        if coft:
            projected = entry.adapter.project(jnp.asarray(arrays["skew"]))
            arrays = arrays | {"skew": np.asarray(projected)}
        write(row, layout(entry.spec.unstacked(), entry.kernel_shape, entry.adapter), arrays)
    return {}, config


OFT_TYPE = PeftType(
    name="OFT",
    keys=keys(
        """
        r oft_block_size module_dropout init_weights fan_in_fan_out coft eps block_share
        use_cayley_neumann num_cayley_neumann_terms
        """
    ),
    kinds=("dense", "conv", "embedding"),
    adapters=(OFT,),
    read=OFTReader,
    write=export_oft,
    check=check_oft,
)
