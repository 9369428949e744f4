"""Reading HF-PEFT adapter folders into a plan and an adapter tree, strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import Replace
from flora_jax.core import paths
from flora_jax.core.errors import FormatError, StructureError, nearest
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.plan import Plan, make_entry
from flora_jax.core.spec import KernelSpec, infer
from flora_jax.io.peft_config import HEADS, PREFIX, PeftConfig, read_config
from flora_jax.io.peft_layouts import check_spec
from flora_jax.io.peft_methods import Site
from flora_jax.io.peft_modules import Leaf, Model, Module, as_name_map
from flora_jax.io.peft_prompts import load_prompt, prompt_type
from flora_jax.io.peft_types import TYPES
from flora_jax.io.safetensors import TensorFiles

WEIGHTS = "adapter_model.safetensors"


def load_peft(
    folder: str | Path,
    params: Any,
    names: Any,
    *,
    specs: Mapping[str, KernelSpec] | Sequence[tuple[str, KernelSpec]] = (),
    dtype: Any = None,
) -> tuple[Plan, AdapterTree]:
    """A plan and its adapters from an HF-PEFT folder of any type in ``io/peft_types.py``.

    ``flora_jax.bind(params, adapters, plan)`` then computes what PEFT computes. Every tensor of
    the file is used and every array that ``adapter_config.json`` promises is found. On a scanned
    stack, layers without an adapter get the identity and smaller ranks are padded with zeros (the
    layers' own scales are folded into ``b``): see docs/formats.md.

    Args:
      folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
      params: the base. Shapes suffice, except for DoRA, PiSSA, OLoRA, embedding adapters and
        modules saved for some layers only, which need its values.
      names: the base's name map: a model with ``to_hf()``, a Hugging Face config or a ``NameMap``.
      specs: ordered ``{regex: KernelSpec}``, as in :func:`flora_jax.plan`.
      dtype: of the adapters; ``None`` keeps the file's.

    Returns:
      ``(plan, {path: {name: array}})``.

    Raises:
      FormatError: not a PEFT folder, a pickle, or a configuration without counterpart here.
      StructureError: missing, extra or misshaped tensors.
      PlanError: an adapter that does not fit its weight.
    """
    folder = Path(folder)
    if prompt_type(folder):
        return load_prompt(folder, _open(folder), Model(params, names), dtype)
    config = read_config(folder, TYPES)
    tensors = _open(folder)
    prefix = as_name_map(names).prefix
    bare = bool(prefix) and not any(key.startswith(PREFIX + prefix) for key in tensors)
    return _Loader(config, tensors, Model(params, names, bare=bare), specs, dtype).load()


def _open(folder: Path) -> TensorFiles:
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise FormatError(
            f"{folder}: adapter_model.bin is a pickle, which is never read; save the adapter with "
            "safe_serialization=True"
        )
    return TensorFiles(path)


class _Loader:
    """One folder being read: hands out tensors and keeps account of them."""

    def __init__(
        self, config: PeftConfig, tensors: TensorFiles, model: Model, specs: Any, dtype: Any
    ):
        self.config, self.tensors, self.model, self.dtype = config, tensors, model, dtype
        self.used: set[str] = set()
        self.sites: dict[str, Site] = {}
        self.specs = paths.Rules.of(specs).match(model.params)

    def load(self) -> tuple[Plan, AdapterTree]:
        """Adapters, then whole modules, then whatever repeats the base; nothing may remain."""
        targeted = self._targeted()
        self.sites = {path: self._site(path, modules) for path, modules in targeted.items()}
        reader = TYPES[self.config.method].read(self.config, self)
        found = {path: reader.read(site) for path, site in self.sites.items()}
        adapted = {name for site in self.sites.values() for name in site.names.values()}
        self._check_tied(adapted)
        found |= self._replaced(adapted)
        self._finish()
        entries, adapters = [], {}
        for path in (p for p in self.model.params if p in found):
            adapter, arrays = found[path]
            leaf = self.model.params[path]
            shape = tuple(leaf.shape)
            spec = self._spec(path, shape)
            entries.append(make_entry(path, adapter, spec, shape, str(leaf.dtype)))
            adapters[path] = {name: self._final(array) for name, array in arrays.items()}
        return Plan(tuple(entries)), adapters

    def take(self, key: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        """A tensor that must be there, of a shape.

        Raises:
          StructureError: it is not, or of another shape.
        """
        if key not in self.tensors:
            near = ", ".join(nearest(key, set(self.tensors) - self.used)) or "nothing unused"
            raise StructureError(f"{self.tensors.path}: no {key!r}, needed for {why}; near: {near}")
        found = self.tensors.shape(key)
        if found != tuple(shape):
            raise StructureError(
                f"{self.tensors.path}: {key} has shape {found}, {why} needs {tuple(shape)}"
            )
        self.used.add(key)
        return self.tensors[key]

    def _targeted(self) -> dict[str, dict[int | None, Module]]:
        """``{our path: {layer: module}}`` of everything the configuration puts an adapter on."""
        targeted: dict[str, dict[int | None, Module]] = {}
        for module in self.model.modules.values():
            if module.kind != "other" and self.config.targets(module.name, module.kind):
                leaf = module.leaves["weight"]
                targeted.setdefault(leaf.path, {})[leaf.layer] = module
        if not targeted:
            wanted = self.config["target_modules"]
            near = ", ".join(nearest(str(wanted), self.model.modules))
            raise StructureError(
                f"{self.config.where}: target_modules={wanted!r} matches no module; nearest: {near}"
            )
        return targeted

    def _spec(self, path: str, shape: tuple[int, ...]) -> KernelSpec:
        return self.specs.get(path) or infer(path, shape)

    def _site(self, path: str, modules: dict[int | None, Module]) -> Site:
        shape = tuple(self.model.params[path].shape)
        spec = self._spec(path, shape)
        check_spec(path, spec, TYPES[self.config.method])
        stack = spec.stack_shape(shape)
        value = lambda layer: self.model.value(modules_of[layer])
        slot = next(iter(modules.values())).leaves["weight"].slot
        layers = range(stack[0]) if slot.stacked else [None]
        modules_of = {layer: Leaf(path, layer, slot) for layer in layers}
        names = {layer: module.name for layer, module in modules.items()}
        return Site(path, spec.unstacked(), shape[len(stack) :], names, tuple(layers), value)

    def _final(self, array: np.ndarray) -> Any:
        return jnp.asarray(array, self.dtype)

    def _check_tied(self, adapted: set[str]) -> None:
        """The head of a tied model must be adapted with the embedding, as one leaf of ours is."""
        for original, copy in self.model.tied.items():
            whole = self.config.kept_whole(original) and not self.config.kept_whole(copy)
            if (original in adapted or whole) and not self.config["ensure_weight_tying"]:
                raise StructureError(
                    f"{self.config.where}: {original} is adapted and {copy}, which the base ties "
                    "to it, is not (ensure_weight_tying is off); untie the base to load it"
                )
            if original in adapted:
                self._take_transposed(original, copy)

    def _take_transposed(self, original: str, copy: str) -> None:
        """A tied head's ``A, B`` repeat the embedding's ``B^T, A^T``."""
        pairs = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
        for theirs, ours in pairs.items():
            key, twin = f"{PREFIX}{copy}.{theirs}", f"{PREFIX}{original}.{ours}"
            if key not in self.tensors:
                continue
            array = self.take(key, self.tensors.shape(twin)[::-1], f"{copy}, tied to {original}")
            if not np.array_equal(array, self.tensors[twin].T):
                raise StructureError(f"{self.tensors.path}: {key} is not the transpose of {twin}")

    def _replaced(self, adapted: set[str]) -> dict[str, tuple[Replace, dict[str, np.ndarray]]]:
        """Leaves that the file holds whole: modules_to_save, biases, resized vocabularies."""
        values: dict[str, dict[int | None, np.ndarray]] = {}
        slots = {}
        for key, leaf in self._whole(adapted).items():
            shape = leaf.slot.their_shape(self.model.params[leaf.path].shape)
            array = leaf.slot.ours(self.take(key, shape, leaf.path))
            values.setdefault(leaf.path, {})[leaf.layer] = array
            slots[leaf.path] = leaf.slot
        out = {}
        for path, rows in values.items():
            dtype = str(np.dtype(self.dtype or next(iter(rows.values())).dtype))
            own = str(self.model.params[path].dtype)
            if None in rows:
                value = rows[None]
            else:
                n = self.model.params[path].shape[0]
                base = lambda i: self.model.value(Leaf(path, i, slots[path]))  # noqa: B023
                value = np.stack([rows[i] if i in rows else base(i) for i in range(n)])
            adapter = Replace(dtype="" if dtype == own else dtype)
            out[path] = adapter, {"value": value}
        return out

    def _whole(self, adapted: set[str]) -> dict[str, Leaf]:
        """``{key: leaf}`` of whole tensors that are, or must be, in the file."""
        config, wanted = self.config, {}
        containers = [n for n in self.model.all_names() if config.kept_whole(n)]
        bias = config["bias"] or "none"
        for name, module in self.model.modules.items():
            saved = any(name == c or name.startswith(f"{c}.") for c in containers)
            own = name in adapted
            for parameter, leaf in module.leaves.items():
                key = f"{PREFIX}{name}.{'base_layer.' if own else ''}{parameter}"
                is_bias = parameter == "bias" and (bias == "all" or (bias != "none" and own))
                if saved or is_bias or self._grown_vocabulary(key, module, own):
                    wanted[key] = leaf
                if saved and is_bias:
                    self._skip_wrapped(key, name)
        self._tied_copies()
        return wanted

    def _skip_wrapped(self, key: str, name: str) -> None:
        """``bias="all"`` repeats the bias of a saved module beside the frozen original."""
        inner = f"{PREFIX}{name}.modules_to_save.bias"
        if inner in self.tensors and key in self.tensors:
            if not np.array_equal(self.tensors[inner], self.tensors[key]):
                raise StructureError(f"{self.tensors.path}: {inner} differs from {key}")
            self.used |= {inner, f"{PREFIX}{name}.original_module.bias"} & set(self.tensors)

    def _grown_vocabulary(self, key: str, module: Module, adapted: bool) -> bool:
        """Whether a table differs from the base's; PEFT adds those of adapted vocabularies too.

        Raises:
          StructureError: a table that differs from the base lies under an adapter.
        """
        head = module.name.rpartition(".")[2] in HEADS
        if key not in self.tensors or not (head or module.kind == "embedding"):
            return False
        leaf = module.leaves[key.rpartition(".")[2]]
        base = leaf.slot.theirs(self.model.value(leaf))
        if base.shape == self.tensors.shape(key) and np.array_equal(
            base, self.tensors[key].astype(base.dtype)
        ):
            self.used.add(key)
            return False
        if adapted:
            raise StructureError(
                f"{self.tensors.path}: {key} differs from the base's {leaf.path}: another base, or "
                "a resized vocabulary"
            )
        return True

    def _tied_copies(self) -> None:
        """A tied head saved beside its table must equal it."""
        for original, copy in self.model.tied.items():
            for infix in ("", "base_layer."):
                key, twin = (f"{PREFIX}{n}.{infix}weight" for n in (copy, original))
                if key in self.tensors and twin in self.tensors:
                    if not np.array_equal(self.tensors[key], self.tensors[twin]):
                        raise StructureError(f"{self.tensors.path}: {key} differs from {twin}")
                    self.used.add(key)

    def _finish(self) -> None:
        extra = sorted(set(self.tensors) - self.used)
        if extra:
            near = ", ".join(nearest(extra[0], self.used))
            raise StructureError(
                f"{self.tensors.path}: {len(extra)} tensors that {self.config.where} does not "
                f"explain, first {extra[0]!r}; nearest used: {near}"
            )
