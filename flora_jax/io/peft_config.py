"""``adapter_config.json`` of HF PEFT: what is read, what is refused, which modules it means.

Module names here are torch's (``model.layers.0.self_attn.q_proj``). The matching rules are those
of PEFT 0.21: ``check_target_module_exists`` and ``get_pattern_key`` (read, not copied).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flora_jax.core.errors import FormatError, nearest, unknown
from flora_jax.io.files import read_json

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
HEADS = ("lm_head", "score", "classifier")
"""Output layers that ``all-linear`` leaves alone."""


def keys(text: str) -> frozenset[str]:
    """The words of a text: a set of configuration keys."""
    return frozenset(text.split())


COMMON = keys(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias
    """
)
# Initialisations that leave the base weight alone; the adapter is then plain LoRA.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Initialisations that edit the base weight in a way that can be computed again.
REBASED_INITS = ("pissa", "olora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftType:
    """One ``peft_type``: its configuration, its layers, how its tensors are read and written.

    Args:
      name: the word in ``adapter_config.json``.
      keys: configuration keys that are read, or do not matter, beside the common ones.
      kinds: kernel kinds that have a layer.
      conv1d: whether GPT-2's Conv1D, whose weight is ``[in, out]``, has a layer.
      biases: whether the configuration can train biases beside the adapters.
      adapters: our classes that are written as this type; none when it is only read.
      read: ``read(config, source)`` gives an object whose ``read(site)`` is ``(adapter, arrays)``.
      write: ``write(rows, model)`` fills the rows' ``file`` and gives ``(further tensors, keys)``.
      check: raises FormatError for a configuration without counterpart here.
      tie: ``tie(tensors, original, copy)`` gives the tensors of a head tied to its table.
    """

    name: str
    keys: frozenset[str]
    kinds: tuple[str, ...]
    read: Callable[..., Any]
    write: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None
    adapters: tuple[type, ...] = ()
    conv1d: bool = False
    biases: bool = True
    check: Callable[[PeftConfig], None] = lambda config: None
    tie: Callable[..., dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """A checked configuration.

    Args:
      where: the file, for messages.
      values: its JSON object.
    """

    where: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def method(self) -> str:
        """The ``peft_type``: ``LORA``, ``VERA``, ``IA3`` ..."""
        return self.values["peft_type"]

    def number(self, key: str, default: float) -> Any:
        """A numeric value.

        Raises:
          FormatError: it is something else.
        """
        value = self.values.get(key, default)
        if not is_number(value):
            raise FormatError(f"{self.where}: {key}={value!r} is not a number")
        return value

    def whole(self, key: str, default: int) -> int:
        """A whole number.

        Raises:
          FormatError: it is something else.
        """
        value = self.number(key, default)
        if int(value) != value:
            raise FormatError(f"{self.where}: {key}={value!r} is not a whole number")
        return int(value)

    def patterned(self, name: str, key: str, default: int, pattern: str) -> Any:
        """``r`` or ``lora_alpha`` of one module: the first pattern that matches, else the default.

        A pattern is a regex on the end of the name: ``(.*\\.)?(pattern)$``.
        """
        for regex, value in (self[pattern] or {}).items():
            if _match(rf"(.*\.)?({regex})$", name, self.where):
                return value
        return self.whole(key, default) if key == "r" else self.number(key, default)

    def kept_whole(self, name: str) -> bool:
        """Whether ``modules_to_save`` names the module (PEFT compares ends, dots or not)."""
        return any(name.endswith(end) for end in self["modules_to_save"] or ())

    def targets(self, name: str, kind: str) -> bool:
        """Whether the configuration puts an adapter on a module.

        Args:
          kind: ``linear``, ``conv`` or ``embedding``; ``all-linear`` means the first.
        """
        wanted = self["target_modules"]
        if self._excluded(name):
            return False
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return kind == "linear" and name.rpartition(".")[2] not in HEADS
        if isinstance(wanted, str):
            return bool(_match(rf"(?:{wanted})\Z", name, self.where))
        if name in wanted:
            return True
        return ends_with_any(name, wanted) and self._transforms_layer(name)

    def _excluded(self, name: str) -> bool:
        out = self["exclude_modules"] or ()
        if isinstance(out, str):
            if _match(rf"(?:{out})\Z", name, self.where):
                return True
        elif ends_with_any(name, out):
            return True
        whole = self["modules_to_save"] or ()
        return any(_match(rf"(^|.*\.){m}($|\..*)", name, self.where) for m in whole)

    def _transforms_layer(self, name: str) -> bool:
        layers = self["layers_to_transform"]
        if layers is None or layers == []:
            return True
        patterns = self["layers_pattern"] or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        regexes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for r in regexes if (m := _match(r, name, self.where))), None)
        return found is not None and int(found[1]) in (
            [layers] if isinstance(layers, int) else layers
        )

    def feedforward(self, name: str) -> bool:
        """Whether IA3 scales the module's input instead of its output."""
        which = self["feedforward_modules"] or ()
        if isinstance(which, str):
            return bool(_match(rf"(?:{which})\Z", name, self.where))
        return any(name.endswith(end) for end in which)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def ends_with_any(name: str, ends: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``ends`` or ends in ``.`` and one of them."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _match(regex: str, name: str, where: str) -> re.Match[str] | None:
    try:
        return re.match(regex, name)
    except re.error as error:
        raise FormatError(f"{where}: {regex!r} is not a regular expression: {error}") from None


def read_config(folder: str | Path, types: Mapping[str, PeftType]) -> PeftConfig:
    """``adapter_config.json`` of a folder, checked.

    Raises:
      FormatError: another method, a key that is unknown or changes the adapter's meaning in a way
        that has no counterpart here, or a value of a wrong type.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    method = values.get("peft_type")
    if method not in types:
        raise FormatError(f"{path}: {unknown('peft_type', str(method), types)}")
    known = COMMON | types[method].keys
    for key, value in values.items():
        if key not in known and value:
            near = nearest(key, known)[0]
            raise FormatError(f"{path}: {key}={value!r} is not supported; nearest known: {near}")
    config = PeftConfig(str(path), values)
    _check_targets(config)
    types[method].check(config)
    bias = values.get("bias", "none") or "none"
    further = ("all", f"{method.lower()}_only") if types[method].biases else ()
    allowed = ("none", *further)
    if str(bias).lower() not in allowed:
        raise FormatError(f"{path}: bias={bias!r} is not one of {', '.join(allowed)}")
    return config


def _check_targets(config: PeftConfig) -> None:
    for key, kinds in {
        "target_modules": (str, list),
        "exclude_modules": (str, list, type(None)),
        "modules_to_save": (list, type(None)),
        "layers_pattern": (str, list, type(None)),
        "layers_to_transform": (int, list, type(None)),
        "feedforward_modules": (str, list, type(None)),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
    }.items():
        value = config[key]
        items = value if isinstance(value, list) else ()
        inner = int if key == "layers_to_transform" else str
        if not isinstance(value, kinds) or not all(isinstance(i, inner) for i in items):
            raise FormatError(f"{config.where}: {key}={value!r} is of a wrong type")
        for pattern, number in value.items() if isinstance(value, dict) else ():
            if not is_number(number):
                raise FormatError(f"{config.where}: {key} gives {pattern!r} {number!r}")


def check_lora(config: PeftConfig) -> None:
    init = config.values.get("init_lora_weights", True)
    if init not in (*PLAIN_INITS, *REBASED_INITS):
        raise FormatError(
            f"{config.where}: init_lora_weights={init!r} changed the base weight in a way the "
            "file does not say; save it with path_initial_model_for_weight_conversion, which "
            f"makes it plain LoRA (known: {', '.join(map(str, PLAIN_INITS + REBASED_INITS))})"
        )
    if config["use_dora"] and init in REBASED_INITS:
        raise FormatError(f"{config.where}: use_dora with init_lora_weights={init!r}")
    if config["lora_bias"] and config["bias"] not in (None, "none"):
        raise FormatError(f"{config.where}: lora_bias with bias={config['bias']!r}: choose one")
