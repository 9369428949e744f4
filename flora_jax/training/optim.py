"""Optimizers as frozen dataclasses over optax; parameter groups by path rules.

Everything has ``build(params) -> optax.GradientTransformation``; paths are those of the trained
tree, ``layers/self_attn/q_proj/kernel/b``. A bare optax transform is accepted wherever an optimizer
is. The learning rate is injected, so the step can report it (:func:`learning_rates`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from flora_jax.core import paths
from flora_jax.core.errors import ConfigError, RuleError
from flora_jax.training.schedules import Scaled, Schedule, as_schedule

GroupRules = tuple[tuple[str, "Optimizer | None"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base class: a learning rate and what it multiplies.

    Args:
      learning_rate: a number or a :class:`Schedule`.
      weight_decay: decoupled decay, ``p -= lr * weight_decay * p``.
      decay: regexes of the paths that decay; the rest does not.
    """

    learning_rate: float | Schedule = 1e-3
    weight_decay: float = 0.0
    decay: tuple[str, ...] = (".*",)

    def transform(self, learning_rate: Any, mask: Any) -> optax.GradientTransformation:
        """The optax transform for a concrete learning rate and decay mask (None: no decay)."""
        raise NotImplementedError

    @property
    def proportional(self) -> bool:
        """Whether an update is the learning rate times something that does not depend on it."""
        return True

    def moves(self, params: Any) -> dict[str, int]:
        """``{path: entries}``: how many entries of each array one step moves; all, by default."""
        return {path: math.prod(x.shape) for path, x in paths.flatten(params).items()}

    def scaled(self, factor: float) -> Optimizer:
        """The same optimizer with ``factor`` times the learning rate."""
        schedule = Scaled(factor=factor, of=as_schedule(self.learning_rate))
        return dataclasses.replace(self, learning_rate=schedule)

    def build(self, params: Any) -> optax.GradientTransformation:
        """The transform for a tree of trained parameters.

        Raises:
          RuleError: a ``decay`` regex matches nothing.
        """
        mask = None
        if self.weight_decay:
            flat = paths.flatten(params)
            hit = paths.Rules.of([(pattern, True) for pattern in self.decay]).match(flat)
            mask = paths.map_with_path(lambda path, _: path in hit, params)
        make = optax.inject_hyperparams(lambda learning_rate: self.transform(learning_rate, mask))
        return make(learning_rate=as_schedule(self.learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1412.6980, 1711.05101)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    nesterov: bool = False

    def transform(self, learning_rate, mask):
        return optax.adamw(
            learning_rate,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=mask,
            nesterov=self.nesterov,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with optional momentum."""

    momentum: float | None = None
    nesterov: bool = False

    def transform(self, learning_rate, mask):
        sgd = optax.sgd(1.0, momentum=self.momentum, nesterov=self.nesterov)
        # sgd(1.0) already turned the sign: decay joins with that sign, the rate scales both
        decay = optax.add_decayed_weights(-self.weight_decay, mask)
        parts = [sgd, decay] if self.weight_decay else [sgd]
        return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate, flip_sign=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """``v = alpha v + (1 - alpha) g^2``, ``p -= lr g / (sqrt(v) + eps)``.

    The defaults, the place of ``eps`` and the start at ``v = 0`` are torch's; with ``momentum`` the
    quotients are accumulated as ``m = momentum m + quotient``.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    def transform(self, learning_rate, mask):
        scale = optax.scale_by_stddev if self.centered else optax.scale_by_rms
        parts = [scale(decay=self.alpha, eps=self.eps, eps_in_sqrt=False)]
        if self.momentum:
            parts.append(optax.trace(decay=self.momentum))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask))
        return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Evolved sign momentum (arXiv 2302.06675)."""

    b1: float = 0.9
    b2: float = 0.99

    def transform(self, learning_rate, mask):
        return optax.lion(
            learning_rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=mask
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Factored second moments (arXiv 1804.04235); ``weight_decay`` is optax's decay rate."""

    min_dim_size_to_factor: int = 128
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = False

    @property
    def proportional(self) -> bool:
        return not self.weight_decay  # optax adds this decay after the learning rate

    def transform(self, learning_rate, mask):
        return optax.adafactor(
            learning_rate,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            clipping_threshold=self.clipping_threshold,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=mask,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Ordered ``(regex, optimizer)``: each trained array follows the first rule that matches it.

    ``None`` as the optimizer holds a group still. Every array needs a rule and every rule an array.

    Args:
      rules: a dict or pairs.

    >>> rules = {".*/b": AdamW(learning_rate=1.6e-3), ".*": AdamW(learning_rate=1e-4)}
    >>> params = {"q/kernel": {"a": jax.numpy.zeros((4, 2)), "b": jax.numpy.zeros((2, 4))}}
    >>> sorted(Groups(rules=rules).labels(params)["q/kernel"].items())
    [('a', '1 .*'), ('b', '0 .*/b')]
    """

    rules: Any

    def __post_init__(self):
        rules = paths.Rules.of(self.rules).items
        for pattern, optimizer in rules:
            if not (optimizer is None or hasattr(optimizer, "build") or _is_transform(optimizer)):
                raise ConfigError(f"rule {pattern!r}: {optimizer!r} is not an optimizer or None")
        object.__setattr__(self, "rules", rules)

    def labels(self, params: Any) -> Any:
        """The tree of group labels (``"index regex"``).

        Raises:
          RuleError: an array that no rule matches, or a rule that no array reaches.
        """
        rules = paths.Rules.of([(p, f"{i} {p}") for i, (p, _) in enumerate(self.rules)])
        flat = paths.flatten(params)
        hit = rules.match(flat)
        lost = [path for path in flat if path not in hit]
        if lost:
            raise RuleError(
                f"{lost[0]!r} (of {len(lost)}) belongs to no optimizer group; rules: "
                + ", ".join(repr(pattern) for pattern, _ in self.rules)
            )
        return paths.map_with_path(lambda path, _: hit[path], params)

    @property
    def proportional(self) -> bool:
        """Whether every group's updates are; a bare transform's need not be."""
        return all(o is None or getattr(o, "proportional", False) for _, o in self.rules)

    def moves(self, params: Any) -> dict[str, int]:
        """``{path: entries}`` that one step moves; 0 where the optimizer is None."""
        labels, counts = self.labels(params), {}
        for index, (pattern, optimizer) in enumerate(self.rules):
            own = _subtree(params, labels, f"{index} {pattern}")
            still = dict.fromkeys(paths.flatten(own), 0)
            counts |= still if optimizer is None else moves(optimizer, own)
        return counts

    def build(self, params: Any) -> optax.GradientTransformation:
        """``optax.partition`` over the groups."""
        labels = self.labels(params)
        transforms = {}
        for index, (pattern, optimizer) in enumerate(self.rules):
            label = f"{index} {pattern}"
            own = _subtree(params, labels, label)
            transforms[label] = optax.set_to_zero() if optimizer is None else build(optimizer, own)
        return optax.partition(transforms, labels)


def lora_plus(optimizer: Optimizer, ratio: float = 16.0) -> Groups:
    """LoRA+ (arXiv 2402.12354): the rate of every ``b`` is ``ratio`` times that of the rest."""
    return Groups(rules=((".*/b", optimizer.scaled(ratio)), (".*", optimizer)))


def build(optimizer: Any, params: Any) -> optax.GradientTransformation:
    """The optax transform of an optimizer dataclass, or of a bare optax transform.

    Raises:
      ConfigError: neither.
    """
    if hasattr(optimizer, "build"):
        return optimizer.build(params)
    if _is_transform(optimizer):
        return optimizer
    raise ConfigError(f"{optimizer!r} is not an optimizer")


def moves(optimizer: Any, params: Any) -> dict[str, int]:
    """``{path: entries}``: how many entries of each trained array one step of ``optimizer`` moves.

    Args:
      params: arrays or ShapeDtypeStructs.
    """
    if hasattr(optimizer, "moves"):
        return optimizer.moves(params)
    return Optimizer().moves(params)


def learning_rates(opt_state: Any) -> dict[str, jax.Array]:
    """``{"lr": rate}``, or ``{"lr/<group regex>": rate}`` with groups; empty for bare transforms.

    Read from an optimizer state; the values are those of the update that made it.
    """
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    rates: dict[str, jax.Array] = {}
    for path, value in found:
        if not hasattr(value, "dtype"):  # the schedule's own counter has the same name
            continue
        keys = [str(getattr(entry, "key", "")) for entry in path]
        group = next((k.partition(" ")[2] for k in keys if k[:1].isdigit() and " " in k), "")
        rates[f"lr/{group}" if group else "lr"] = value
    return rates


def _is_transform(optimizer: Any) -> bool:
    return hasattr(optimizer, "init") and hasattr(optimizer, "update")


def _subtree(params: Mapping[str, Any], labels: Mapping[str, Any], label: str) -> Any:
    """``params`` with the arrays of other groups masked out, as ``optax.partition`` passes them."""
    return jax.tree.map(lambda p, l: p if l == label else optax.MaskedNode(), params, labels)
