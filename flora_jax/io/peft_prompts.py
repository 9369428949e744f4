"""HF-PEFT's PROMPT_TUNING and PREFIX_TUNING: one table ``prompt_embeddings`` for a whole model.

    PROMPT_TUNING   ``[P, D]``             rows of :class:`flora_jax.PromptTuning`
    PREFIX_TUNING   ``[P, layers 2 out]``  layer by layer the keys, then the values

They name no modules, so they are kept apart from the types of ``io/peft_types.py``. As PEFT 0.21
reads and writes them; with ``prefix_projection`` the file holds the projected table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from flora_jax.adapters import PrefixTuning, PromptTuning
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import FormatError, PlanError, StructureError, nearest
from flora_jax.core.initialize import AdapterTree, over_stack
from flora_jax.core.plan import Plan, make_entry
from flora_jax.core.spec import infer
from flora_jax.io.files import read_json
from flora_jax.io.peft_config import CONFIG
from flora_jax.io.peft_modules import Model, Module
from flora_jax.io.safetensors import TensorFiles

KEY = "prompt_embeddings"
_SHARED = """
peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers
"""
_OWN = {
    "PROMPT_TUNING": (
        "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
    ),
    "PREFIX_TUNING": "encoder_hidden_size prefix_projection init_weights",
}
PROMPT_TYPES: dict[str, frozenset[str]] = {
    name: frozenset((_SHARED + own).split()) for name, own in _OWN.items()
}
TABLES = ("embed_tokens", "word_embeddings", "wte")
PAIRS = (("k_proj", "v_proj"), ("key", "value"))

Sites = list[tuple[Module, Module]]


def prompt_type(folder: Path) -> str | None:
    """The type of a folder when it is one of these."""
    name = read_json(folder / CONFIG).get("peft_type")
    return name if name in PROMPT_TYPES else None


def form_of(plan: Plan) -> str | None:
    """The type that a plan's adapters are written as, or None.

    Raises:
      PlanError: a prompt or a prefix beside anything else.
    """
    names = {PromptTuning: "PROMPT_TUNING", PrefixTuning: "PREFIX_TUNING"}
    forms = {names.get(type(entry.adapter)): entry.path for entry in plan}
    if len(forms) > 1 and set(forms) != {None}:
        what = ", ".join(f"{form or 'another method'} at {path}" for form, path in forms.items())
        raise PlanError(f"PEFT's prompt methods stand alone in a file; the plan has {what}")
    return next(iter(forms), None)


def load_prompt(
    folder: Path, tensors: TensorFiles, model: Model, dtype: Any
) -> tuple[Plan, AdapterTree]:
    """The plan and adapters of such a folder.

    Raises:
      FormatError: a configuration key without counterpart.
      StructureError: missing, extra or misshaped tensors.
    """
    where = folder / CONFIG
    config = read_json(where)
    kind, tokens = config["peft_type"], _checked(where, config)
    extra = sorted(set(tensors) - {KEY})
    if extra or KEY not in tensors:
        what = f"no {KEY!r}" if KEY not in tensors else f"tensors beside {KEY!r}: {extra[0]!r}"
        raise StructureError(f"{tensors.path}: {what}; a {kind} file holds that one tensor")
    shape = tuple(tensors.shape(KEY))
    if kind == "PROMPT_TUNING":
        path, width = _table(model)
        _expect(tensors, shape, (tokens, width), f"{tokens} tokens of {path}")
        found: dict[str, tuple[Adapter, Any]] = {
            path: (PromptTuning(tokens=tokens), {"prompt": tensors[KEY]})
        }
    else:
        sites = _attentions(model)
        width = model.params[sites[0][0].leaves["weight"].path].shape[-1]
        _expect(tensors, shape, (tokens, len(sites) * 2 * width), f"{len(sites)} layers")
        table = tensors[KEY].reshape(tokens, len(sites), 2, width)
        found = _split(table, sites, PrefixTuning(tokens=tokens))
    entries, adapters = [], {}
    for path in (p for p in model.params if p in found):
        adapter, arrays = found[path]
        leaf = model.params[path]
        shape = tuple(leaf.shape)
        entries.append(make_entry(path, adapter, infer(path, shape), shape, str(leaf.dtype)))
        adapters[path] = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    return Plan(tuple(entries)), adapters


def _checked(where: Path, config: Mapping[str, Any]) -> int:
    """Checks the configuration; the number of virtual tokens."""
    known = PROMPT_TYPES[config["peft_type"]]
    for key, value in config.items():
        if key not in known and value:
            near = nearest(key, known)[0]
            raise FormatError(f"{where}: {key}={value!r} is not supported; nearest known: {near}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise FormatError(f"{where}: an encoder and a decoder; one of them is supported")
    tokens = config.get("num_virtual_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise FormatError(f"{where}: num_virtual_tokens={tokens!r} is not a positive number")
    return tokens


def _expect(tensors: TensorFiles, shape: Any, wanted: tuple[int, ...], why: str) -> None:
    if tuple(shape) != wanted:
        raise StructureError(f"{tensors.path}: {KEY} has shape {tuple(shape)}, {why} need {wanted}")


def _table(model: Model) -> tuple[str, int]:
    """Path and width of the word embeddings."""
    for module in model.modules.values():
        if module.kind == "embedding" and module.name.rpartition(".")[2] in TABLES:
            path = module.leaves["weight"].path
            return path, model.params[path].shape[-1]
    raise StructureError(f"the base has no table of words ({', '.join(TABLES)})")


def _attentions(model: Model) -> Sites:
    """Key and value projection of every layer, first layer first."""
    sites: dict[int, tuple[Module, Module]] = {}
    for module in model.modules.values():
        parent, _, last = module.name.rpartition(".")
        for key, value in PAIRS:
            other = model.modules.get(f"{parent}.{value}")
            number = re.search(r"\.(\d+)\.", module.name)
            if last == key and other is not None and number is not None:
                sites[int(number[1])] = module, other
    if not sites:
        raise StructureError("the base has no layers with key and value projections")
    return [sites[n] for n in sorted(sites)]


def _split(table: np.ndarray, sites: Sites, adapter: Adapter) -> dict[str, tuple[Adapter, Any]]:
    """``{path: (adapter, arrays)}`` of a table ``[P, layers, 2, out]``."""
    rows: dict[str, list[np.ndarray]] = {}
    stacked = {}
    for n, pair in enumerate(sites):
        for which, module in enumerate(pair):
            leaf = module.leaves["weight"]
            rows.setdefault(leaf.path, []).append(table[:, n, which])
            stacked[leaf.path] = leaf.layer is not None
    return {
        path: (adapter, {"prefix": np.stack(own) if stacked[path] else own[0]})
        for path, own in rows.items()
    }


def write_prompt(
    form: str, adapters: AdapterTree, plan: Plan, model: Model, names: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and configuration keys of a plan of prompts or prefixes.

    Raises:
      PlanError: not the word embeddings, or not the keys and values of every layer alike.
    """
    adapter = plan.entries[0].adapter
    config: dict[str, Any] = {
        "num_virtual_tokens": adapter.tokens,
        "num_transformer_submodules": 1,
    }
    hf = names.to_hf() if isinstance(names, nn.Module) else names
    if not isinstance(hf, Mapping):
        raise PlanError("PEFT's prompt methods need the model or its config as names=")
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    if form == "PROMPT_TUNING":
        path, width = _table(model)
        if [entry.path for entry in plan] != [path]:
            raise PlanError(f"PEFT has one prompt, at {path}; the plan has {plan.entries[0].path}")
        table = np.asarray(adapters[path]["prompt"])
    else:
        heads = hf.get("num_key_value_heads") or heads
        table = _joined(adapters, plan, _attentions(model))
        width = table.shape[1] // (2 * layers)
        config["prefix_projection"] = False
    config |= {"token_dim": width, "num_attention_heads": heads, "num_layers": layers}
    return {KEY: np.ascontiguousarray(table)}, config


def _joined(adapters: AdapterTree, plan: Plan, sites: Sites) -> np.ndarray:
    """``[P, layers 2 out]`` of the prefixes of every layer."""
    values = {entry.path: _values(adapters, plan, entry) for entry in plan}
    rows = []
    for module in (module for pair in sites for module in pair):
        leaf = module.leaves["weight"]
        if leaf.path not in values:
            raise PlanError(f"PEFT has a prefix in every layer; {leaf.path} has none in the plan")
        rows.append(values[leaf.path] if leaf.layer is None else values[leaf.path][leaf.layer])
    wanted = {module.leaves["weight"].path for pair in sites for module in pair}
    strange = sorted(set(values) - wanted)
    if strange or len({row.shape for row in rows}) > 1:
        what = strange[0] if strange else "their lengths or widths differ"
        raise PlanError(f"PEFT has prefixes of keys and values, all of one size: {what}")
    return np.concatenate(rows, axis=1)


def _values(adapters: AdapterTree, plan: Plan, entry: Any) -> np.ndarray:
    """``[*stack, P, out]``, projected where a small network makes it."""
    own = adapters[entry.path]
    if not entry.adapter.projection:
        return np.asarray(own["prefix"])
    pool = adapters[plan.pool_of(entry.adapter).path]
    table = over_stack(lambda arrays: entry.adapter.table(arrays, pool), len(entry.stack))
    return np.asarray(table(own))
