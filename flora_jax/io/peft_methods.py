"""HF-PEFT methods, one class each: from the tensors of a file to an adapter of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import IA3, DoRA, LoRA, OLoRA, PiSSA, VeRA
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import PlanError
from flora_jax.core.spec import KernelSpec
from flora_jax.io import peft_layouts as layouts
from flora_jax.io.peft_config import PREFIX, PeftConfig

Arrays = dict[str, np.ndarray]
SCALED = ("b", "b0", "bias")
"""What carries the branch's scale: a layer's own scale is folded into these."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight of ours and the modules of the file that lie in it.

    Args:
      spec, shape: of the unstacked kernel.
      names: layer (None when not stacked) to module name, adapted layers only.
      layers: every layer of the leaf; ``(None,)`` when not stacked.
      value: base value of a layer.
    """

    path: str
    spec: KernelSpec
    shape: tuple[int, ...]
    names: dict[int | None, str]
    layers: tuple[int | None, ...]
    value: Callable[[int | None], np.ndarray]

    def stack(self, rows: dict[int | None, Arrays]) -> Arrays:
        """Rows of all layers joined along the leading axis."""
        if self.layers == (None,):
            return rows[None]
        return {n: np.stack([rows[i][n] for i in self.layers]) for n in rows[self.layers[0]]}


def read(source: Any, site: Site, layer: int | None, rows: list[layouts.Layout]) -> Arrays:
    """The arrays of one module, in our layout."""
    name = site.names[layer]
    key = lambda row: f"{PREFIX}{name}.{row.suffix}"
    return {row.ours: row.read(source.take(key(row), row.shape, site.path)) for row in rows}


class Reader:
    """One file being read by one method."""

    def __init__(self, config: PeftConfig, source: Any):
        self.config, self.source = config, source

    def read(self, site: Site) -> tuple[Adapter, Arrays]:
        """The adapter of one weight and its arrays."""
        raise NotImplementedError


class LoRAReader(Reader):
    """LoRA, rsLoRA, DoRA; PiSSA and OLoRA with their initial factors computed again."""

    def adapter(self, site: Site, name: str) -> LoRA:
        """The adapter that the configuration gives one module."""
        config = self.config
        rank = config.patterned(name, "r", 8, "rank_pattern")
        alpha = config.patterned(name, "lora_alpha", 8, "alpha_pattern")
        init = config["init_lora_weights"]
        cls = {"pissa": PiSSA, "olora": OLoRA}.get(init, DoRA if config["use_dora"] else LoRA)
        # An embedding's branch has no dropout in PEFT either.
        dropout = 0.0 if site.spec.kind == "embedding" else config.number("lora_dropout", 0.0)
        return cls(
            rank=rank,
            alpha=float(alpha),
            rslora=bool(config["use_rslora"]),
            dropout=float(dropout),
            use_bias=bool(config["lora_bias"]),
            initializer="gaussian" if init == "gaussian" else "kaiming",
        )

    def read(self, site):
        adapters = {layer: self.adapter(site, name) for layer, name in site.names.items()}
        widest = max(adapters.values(), key=lambda adapter: adapter.rank)
        rows = {layer: self._row(site, layer, own, widest) for layer, own in adapters.items()}
        like = next(iter(rows.values()))
        for layer in site.layers:
            if layer not in rows:
                rows[layer] = self._nothing(site, layer, like)
        return widest, site.stack(rows)

    def _row(self, site: Site, layer: int | None, own: LoRA, widest: LoRA) -> Arrays:
        table = layouts.lora(
            site.spec, site.shape, own.rank, bias=own.use_bias, dora=isinstance(own, DoRA)
        )
        arrays = read(self.source, site, layer, table) | _buffers(own, site, layer)
        ratio = own.scale / widest.scale
        for name in SCALED:
            if name in arrays and ratio != 1.0:
                arrays[name] = (arrays[name] * ratio).astype(arrays[name].dtype)
        return _pad(arrays, widest.rank)

    def _nothing(self, site: Site, layer: int | None, like: Arrays) -> Arrays:
        """Arrays with which a layer that has no adapter stays what it is."""
        rows = {name: np.zeros_like(array) for name, array in like.items()}
        if "m" in rows:
            norm2 = _norm2(site, layer)
            rows |= {"m": np.sqrt(norm2).astype(like["m"].dtype), "norm2": norm2}
        return rows


def _norm2(site: Site, layer: int | None) -> np.ndarray:
    matrix = np.asarray(site.spec.canonical(jnp.asarray(site.value(layer))), np.float32)
    return np.square(matrix).sum(-2)


def _buffers(adapter: LoRA, site: Site, layer: int | None) -> Arrays:
    """Frozen arrays that the file does not hold: they follow from the base weight."""
    if isinstance(adapter, DoRA):
        return {"norm2": _norm2(site, layer)}
    if isinstance(adapter, (PiSSA, OLoRA)):
        matrix = site.spec.canonical(jnp.asarray(site.value(layer), jnp.float32))
        a0, b0 = adapter.factors(matrix)
        return {"a0": np.asarray(a0), "b0": np.asarray(b0)}
    return {}


def _pad(arrays: Arrays, rank: int) -> Arrays:
    """Factors widened with zeros to a rank."""
    out = dict(arrays)
    for name, axis in {"a": 1, "a0": 1, "b": 0, "b0": 0}.items():
        if name in out:
            widths = [(0, 0), (0, 0)]
            widths[axis] = (0, rank - out[name].shape[axis])
            out[name] = np.pad(out[name], widths)
    return out


class IA3Reader(Reader):
    def read(self, site):
        ways = {self.config.feedforward(name) for name in site.names.values()}
        if len(ways) > 1:
            raise PlanError(f"{site.path}: feedforward_modules names some of its layers only")
        adapter = IA3(scale="input" if ways.pop() else "output")
        table = layouts.ia3(site.spec, site.shape, adapter.scale)
        rows = {layer: read(self.source, site, layer, table) for layer in site.names}
        like = next(iter(rows.values()))["l"]
        for layer in site.layers:
            rows.setdefault(layer, {"l": np.ones_like(like)})
        return adapter, site.stack(rows)


def torch_uniform(
    generator: np.random.RandomState, shape: tuple[int, ...], fan_in: int
) -> np.ndarray:
    """What torch's kaiming-uniform with gain sqrt 2 draws on a CPU, from the same Mersenne Twister.

    A float32 takes the low 24 bits of one output and is scaled in one fused multiply-add.
    """
    bits = generator.randint(0, 2**32, math.prod(shape), dtype=np.uint32) & np.uint32(2**24 - 1)
    bound = np.float32(math.sqrt(6.0 / fan_in))
    draw = bits.astype(np.float64) * 2.0**-24 * np.float64(bound + bound) - np.float64(bound)
    return draw.astype(np.float32).reshape(shape)


class VeRAReader(Reader):
    """VeRA: ``vera_A (r, max in)``, ``vera_B (max out, r)``, saved or drawn again as torch does."""

    def __init__(self, config, source):
        super().__init__(config, source)
        self.rank = config.whole("r", 256)
        if config.values.get("save_projection", True):
            self.a = self._saved("base_model.vera_A", 0)
            self.b = self._saved("base_model.vera_B", 1)
        else:
            sizes = [site.spec.canonical_shape(site.shape) for site in source.sites.values()]
            n_in, n_out = (max(size) for size in zip(*sizes, strict=True))
            generator = np.random.RandomState(config.number("projection_prng_key", 0))
            self.a = torch_uniform(generator, (self.rank, n_in), n_in)
            self.b = torch_uniform(generator, (n_out, self.rank), self.rank)

    def _saved(self, key: str, rank_axis: int) -> np.ndarray:
        tensors = self.source.tensors
        shape = list(tensors.shape(key)) if key in tensors else [1, 1]
        shape[rank_axis] = self.rank
        return self.source.take(key, tuple(shape), "the shared projections")

    def read(self, site):
        config = self.config
        adapter = VeRA(
            rank=self.rank,
            d_initial=float(config.number("d_initial", 0.1)),
            stored=True,
            dropout=float(config.number("vera_dropout", 0.0)),
        )
        n_in, n_out = site.spec.canonical_shape(site.shape)
        if self.a.shape[1] < n_in or self.b.shape[0] < n_out:
            raise PlanError(
                f"{site.path}: a {n_in}x{n_out} weight is larger than the file's projections "
                f"({self.a.shape[1]}x{self.b.shape[0]})"
            )
        shared = {"a0": self.a[:, :n_in].T, "b0": self.b[:n_out].T}
        table = layouts.vera(site.spec, site.shape, self.rank)
        rows = {layer: read(self.source, site, layer, table) | shared for layer in site.names}
        like = next(iter(rows.values()))
        nothing = {name: np.zeros_like(like[name]) for name in ("d", "b")} | shared
        for layer in site.layers:
            rows.setdefault(layer, nothing)
        return adapter, site.stack(rows)
