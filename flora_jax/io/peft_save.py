"""Writing adapters as HF-PEFT folders that ``peft.PeftModel.from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax.adapters import Replace
from flora_jax.core.errors import FormatError, PlanError, StructureError
from flora_jax.core.initialize import AdapterTree
from flora_jax.core.plan import Entry, Plan, check_adapters
from flora_jax.core.registry import methods, name_of
from flora_jax.io.files import write_json
from flora_jax.io.peft_config import CONFIG, PREFIX, PeftType
from flora_jax.io.peft_export import Row
from flora_jax.io.peft_layouts import check_spec
from flora_jax.io.peft_load import WEIGHTS
from flora_jax.io.peft_modules import Leaf, Model, Module, shortest
from flora_jax.io.peft_prompts import form_of, write_prompt
from flora_jax.io.peft_types import TYPES
from flora_jax.io.safetensors import save_one

Tensors = dict[str, np.ndarray]


def save_peft(
    folder: str | Path,
    adapters: AdapterTree,
    plan: Plan,
    params: Any,
    names: Any,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """An HF-PEFT folder of one type of ``io/peft_types.py``, Replace as modules_to_save or bias.

    PiSSA and OLoRA are written as the LoRA of rank 2r that they are on the original base:
    ``A' = [A; A0]``, ``B' = [B, -B0]``; KORE as the one of rank r, ``A' = A0``, ``B' = B - B0``.
    VeRA is written with its projections. In a scanned stack,
    rank components that are zero are left out layer by layer, and a LoRA that is zero in a layer
    is not written for it.

    Args:
      folder: gets ``adapter_model.safetensors`` and ``adapter_config.json``.
      params: the base; shapes suffice, unless a module is replaced in part.
      names: the base's name map: a model with ``to_hf()``, a Hugging Face config or a ``NameMap``.
      base_model: ``base_model_name_or_path`` of the configuration.
      task_type: PEFT's, e.g. ``CAUSAL_LM``.

    Raises:
      PlanError: a method, or a mixture, that one PEFT adapter cannot express.
      StructureError: adapters and plan differ, or buffers that are needed were folded away.
      FormatError: the folder holds an adapter and ``overwrite`` is false.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() and not overwrite:
        raise FormatError(f"{folder}: already holds {WEIGHTS}; pass overwrite=True")
    check_adapters(adapters, plan)
    model = Model(params, names)
    about = {
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    prompts = form_of(plan)
    if prompts is not None:
        tensors, config = write_prompt(prompts, adapters, plan, model, names)
        _write(folder, tensors, about | {"peft_type": prompts} | config)
        return
    form, rows, whole = _sort(model, adapters, plan)
    tensors, config = form.write(rows, model)
    for row in rows:
        tensors |= {f"{PREFIX}{row.name}.{suffix}": array for suffix, array in row.file.items()}
    targets = {row.name for row in rows if row.file}
    everything = model.all_names()
    config["target_modules"] = shortest(sorted(targets), everything)
    kept, biases = _replaced(model, whole, targets, tensors)
    config["modules_to_save"] = kept or None
    if biases != "none":
        if not form.biases:
            raise PlanError(f"PEFT's {form.name} trains no biases; replace whole modules")
        config["bias"] = f"{form.name.lower()}_only" if biases == "only" else biases
    config |= _tie(model, form, targets, kept, tensors)
    common = about | {"peft_type": form.name}
    if form.conv1d:
        common["fan_in_fan_out"] = _transposed(model, targets)
    elif _transposed(model, targets):
        raise PlanError(f"{min(targets)}: PEFT's {form.name} has no layer for GPT-2's Conv1D")
    _write(folder, tensors, common | config)


def _write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    save_one(folder / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
    write_json(folder / CONFIG, dict(sorted(config.items())))


def _form(entry: Entry) -> PeftType:
    for form in TYPES.values():
        if isinstance(entry.adapter, form.adapters):
            return form
    have = ", ".join(method.name for method in methods("adapter") if method.peft)
    raise PlanError(
        f"{entry.path}: {name_of(entry.adapter)} has no HF-PEFT form; these have one: {have}"
    )


def _sort(
    model: Model, adapters: AdapterTree, plan: Plan
) -> tuple[PeftType, list[Row], dict[str, np.ndarray]]:
    """The PEFT type, one row per adapted module, and ``{path: value}`` of replaced leaves."""
    whole = {e.path: np.asarray(adapters[e.path]["value"]) for e in plan if _is_whole(e)}
    entries = [entry for entry in plan if not _is_whole(entry)]
    forms = {_form(entry).name: entry.path for entry in entries}
    if len(forms) != 1:
        what = ", ".join(f"{m} at {p}" for m, p in forms.items()) or "nothing but replaced leaves"
        raise PlanError(f"a PEFT adapter is of one method; the plan has {what}")
    form = TYPES[next(iter(forms))]
    modules = {m.leaves["weight"]: m.name for m in model.modules.values() if "weight" in m.leaves}
    rows = []
    for entry in entries:
        check_spec(entry.path, entry.spec, form)
        if entry.path not in model.params:
            raise StructureError(f"{entry.path}: in the plan, not in the base")
        slot = model.table.slot(entry.path, entry.shape)
        arrays = {name: np.asarray(array) for name, array in adapters[entry.path].items()}
        for layer in range(entry.stack[0]) if slot.stacked else [None]:
            own = arrays if layer is None else {n: a[layer] for n, a in arrays.items()}
            rows.append(Row(modules[Leaf(entry.path, layer, slot)], entry, layer, own))
    return form, rows, whole


def _is_whole(entry: Entry) -> bool:
    return isinstance(entry.adapter, Replace)


def _transposed(model: Model, targets: set[str]) -> bool:
    """Whether the adapted modules are GPT-2's Conv1D, whose weight is ``[in, out]``."""
    linear = [model.modules[n] for n in targets if model.modules[n].kind == "linear"]
    return bool(linear) and all(m.leaves["weight"].slot.axes is None for m in linear)


def _replaced(
    model: Model, whole: Mapping[str, np.ndarray], targets: set[str], tensors: Tensors
) -> tuple[list[str], str]:
    """Adds replaced leaves to ``tensors``; ``(modules_to_save, "none" | "all" | "only")``."""
    touched = {
        m.name: m for m in model.modules.values() if any(x.path in whole for x in m.leaves.values())
    }
    only_bias = {n for n, m in touched.items() if _bias_alone(m, whole)}
    with_bias = {n for n, m in model.modules.items() if "bias" in m.leaves}
    rest = set(touched) - only_bias
    biases = "none"
    if only_bias:
        biases = "only" if only_bias == with_bias & targets else "all"
        if biases == "all" and only_bias | rest < with_bias:
            missing = sorted(with_bias - only_bias - rest)
            raise PlanError(
                f"PEFT trains all biases or those of the adapted modules; {missing[0]!r} of "
                f"{len(missing)} is missing (replace its bias too, or whole modules)"
            )
    for name in only_bias:
        infix = "base_layer." if name in targets else ""
        tensors[f"{PREFIX}{name}.{infix}bias"] = _value(model, touched[name].leaves["bias"], whole)
    for name in rest:
        if name in targets:
            raise PlanError(f"{name}: PEFT cannot both adapt a module and save it whole")
        for parameter, leaf in touched[name].leaves.items():
            tensors[f"{PREFIX}{name}.{parameter}"] = _value(model, leaf, whole)
    return shortest(sorted(rest), model.all_names(), str.endswith), biases


def _bias_alone(module: Module, whole: Mapping[str, np.ndarray]) -> bool:
    return [p for p, leaf in module.leaves.items() if leaf.path in whole] == ["bias"]


def _value(model: Model, leaf: Leaf, whole: Mapping[str, np.ndarray]) -> np.ndarray:
    """A torch parameter: replaced, or the base's where its module is replaced in part."""
    if leaf.path not in whole:
        return np.ascontiguousarray(leaf.slot.theirs(model.value(leaf)))
    value = whole[leaf.path] if leaf.layer is None else whole[leaf.path][leaf.layer]
    return np.ascontiguousarray(leaf.slot.theirs(value))


def _tie(
    model: Model, form: PeftType, targets: set[str], kept: list[str], tensors: Tensors
) -> dict[str, Any]:
    """A tied head follows its embedding in our model; PEFT has to be told."""
    for original, copy in model.tied.items():
        if original in targets:
            if form.tie is None:
                raise PlanError(
                    f"{original}: {form.name} has no PEFT form where {copy} is tied to it"
                )
            tensors |= form.tie(tensors, original, copy)
            return {"ensure_weight_tying": True}
        weight = f"{PREFIX}{original}.weight"
        if weight in tensors:
            tensors[f"{PREFIX}{copy}.weight"] = tensors[weight]
            return {"ensure_weight_tying": True}
    return {}
