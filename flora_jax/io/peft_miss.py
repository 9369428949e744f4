"""HF-PEFT's MISS (its forms true, bat and mini), and BONE as it was called before."""

from __future__ import annotations

from typing import Any

import numpy as np

from flora_jax.adapters import Bone, MiSS
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import FormatError, PlanError
from flora_jax.core.spec import KernelSpec
from flora_jax.io.peft_config import PeftConfig, PeftType, keys
from flora_jax.io.peft_export import Row, acting, common, write
from flora_jax.io.peft_layouts import Layout
from flora_jax.io.peft_methods import Reader, read
from flora_jax.io.peft_modules import Model

WAYS = {"MISS": (True, False, "bat", "mini"), "BONE": (True, False, "bat")}


def layout(
    spec: KernelSpec, shape: tuple[int, ...], adapter: Adapter, suffix: str = "miss_block"
) -> list[Layout]:
    """``(r, out)``, mini ``(r, m)``, bat ``(out/r, r, r)``, whose blocks are transposed."""
    _, n_out = spec.canonical_shape(shape)
    r = adapter.rank
    if isinstance(adapter, Bone):
        blocks = (n_out // r, r, r)
        return [Layout("blocks", suffix, blocks, (0, 2, 1), blocks)]
    name, width = ("mini", adapter.mini_r) if adapter.mini_r else ("block", n_out)
    return [Layout(name, suffix, (r, width), (0, 1), (r, width))]


class MissReader(Reader):
    """``init_weights`` says which form the tensors have."""

    def adapter(self) -> Adapter:
        """The same for every module: PEFT has no patterns here."""
        config = self.config
        way, rank = config.values.get("init_weights", True), config.whole("r", 64)
        if way == "bat":
            # PEFT makes a dropout layer here as well and does not use it.
            return Bone(rank=rank)
        return MiSS(
            rank=rank,
            mini_r=config.whole("mini_r", 1) if way == "mini" else 0,
            initializer="zeros" if way else "kaiming",
            dropout=float(config.number("miss_dropout", 0.0)),
        )

    def read(self, site):
        adapter = self.adapter()
        suffix = f"{self.config.method.lower()}_block"
        table = layout(site.spec, site.shape, adapter, suffix)
        rows = {layer: read(self.source, site, layer, table) for layer in site.names}
        nothing = {name: np.zeros_like(array) for name, array in next(iter(rows.values())).items()}
        for layer in site.layers:
            rows.setdefault(layer, nothing)
        return adapter, site.stack(rows)


def check_miss(config: PeftConfig) -> None:
    """Raise FormatError for a form that does not exist."""
    way = config.values.get("init_weights", True)
    if way not in WAYS[config.method]:
        known = ", ".join(map(str, WAYS[config.method]))
        raise FormatError(f"{config.where}: init_weights={way!r} is not one of {known}")


def _way(row: Row) -> Any:
    adapter, path = row.entry.adapter, row.entry.path
    if isinstance(adapter, Bone):
        if adapter.group != "row":
            raise PlanError(f"{path}: Bone(group='col') has no HF-PEFT form; group='row' has")
        return "bat"
    if adapter.share != "in":
        raise PlanError(f"{path}: MiSS(share='out') has no HF-PEFT form; share='in' has")
    return "mini" if adapter.mini_r else adapter.initializer == "zeros"


def export_miss(rows: list[Row], model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """MiSS and Bone as ``miss_block``; layers of a stack that do nothing are left out."""
    way = common(rows, "init_weights", _way)
    for row in acting(rows):
        spec = row.entry.spec.unstacked()
        write(row, layout(spec, row.entry.kernel_shape, row.entry.adapter), row.arrays)
    config = {
        "r": common(rows, "r", lambda row: row.entry.adapter.rank),
        "init_weights": way,
        "bias": "none",
    }
    if way != "bat":
        config["miss_dropout"] = common(
            rows, "miss_dropout", lambda row: row.entry.adapter.dropout
        )
    if way == "mini":
        config["mini_r"] = common(rows, "mini_r", lambda row: row.entry.adapter.mini_r)
    return {}, config


MISS = PeftType(
    name="MISS",
    keys=keys("r mini_r miss_dropout init_weights"),
    kinds=("dense",),
    adapters=(MiSS, Bone),
    read=MissReader,
    write=export_miss,
    check=check_miss,
)
BONE = PeftType(
    name="BONE",
    keys=keys("r init_weights"),
    kinds=("dense",),
    read=MissReader,
    check=check_miss,
)
