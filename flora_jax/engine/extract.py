"""LoRA from a pair of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core import paths
from flora_jax.core.errors import ConfigError, PlanError, StructureError, unknown
from flora_jax.core.initialize import over_stack
from flora_jax.core.leaf import dense, is_leaf
from flora_jax.core.spec import KernelSpec, infer
from flora_jax.engine.build import Builder, Converted
from flora_jax.engine.changes import Change
from flora_jax.engine.compress import Target, from_matrix


def extract_lora(
    base: Any,
    tuned: Any,
    rules: str | Sequence[str] | Mapping[str, int | None],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    randomized: bool | None = None,
    others: str = "error",
    specs: Mapping[str, KernelSpec] | Sequence[tuple[str, KernelSpec]] = (),
) -> Converted:
    """The LoRA nearest to ``tuned - base`` at the weights that a rule matches.

    Each weight's difference is decomposed on its own (Eckart-Young: the best of its rank) and cut
    to the limits; weights that do not differ get no LoRA. The base may hold low-bit leaves: the
    LoRA then makes up for their rounding too.

    Args:
      rules: regexes of paths, or ``{regex: rank}`` with None for the common one.
      rank, energy, error: limits, as for :func:`flora_jax.to_lora`; at least one.
      randomized: by a random sketch (fixed key) instead of the full SVD; None: where it pays.
      others: leaves that differ but match no rule: ``error``, ``replace`` (kept whole) or
        ``ignore``.
      specs: layouts that names do not tell, as for :func:`flora_jax.plan`.

    Returns:
      ``(plan, adapters, report)``.

    Raises:
      StructureError: the checkpoints differ in paths or shapes; a leaf differs and no rule has it.
      PlanError: a rule matches a vector; nothing differs.
      RuleError: a rule matches nothing.
    """
    if others not in ("error", "replace", "ignore"):
        raise ConfigError(unknown("others", others, ("error", "replace", "ignore")))
    common = Target(rank=rank, energy=energy, error=error, randomized=randomized)
    before, after = (paths.flatten(tree, is_leaf=is_leaf) for tree in (base, tuned))
    _check_same(before, after)
    if isinstance(rules, str):
        rules = [rules]
    rules = rules if isinstance(rules, Mapping) else dict.fromkeys(rules)
    ranks = paths.Rules.of(rules).match(before)
    given = paths.Rules.of(specs).match(before)
    built, unmatched = Builder(), []
    for path, leaf in before.items():
        if path not in ranks and others == "ignore":
            continue
        spec = given.get(path) or _infer(path, leaf, path in ranks)
        change = Change(path, spec, tuple(leaf.shape), str(leaf.dtype), leaf, after[path])
        if path in ranks and not change.is_kernel:
            raise PlanError(f"{path}: a {spec.kind} leaf has no LoRA; see others='replace'")
        if not _differs(change):
            continue
        if path not in ranks:
            unmatched.append(path)
            built.replace(change, _plain(after[path], change.depth))
            continue
        target = common if ranks[path] is None else _with_rank(common, ranks[path])
        if not target.given:
            raise PlanError(f"{path}: give rank=, energy= or error=")
        built.lora(change, from_matrix(change.matrix(), target, path))
    if unmatched and others == "error":
        raise StructureError(
            f"{len(unmatched)} leaves differ and match no rule: {', '.join(unmatched[:4])}; add "
            "rules, or pass others='replace' or 'ignore'"
        )
    if not built.entries:
        raise PlanError("nothing differs between the checkpoints where the rules look")
    return built.done()


def _with_rank(target: Target, rank: int) -> Target:
    return Target(rank=rank, energy=target.energy, error=target.error, randomized=target.randomized)


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))[0]
        where = "the base" if odd in before else "the tuned checkpoint"
        raise StructureError(f"{odd} is in {where} only")
    for path, leaf in before.items():
        if tuple(leaf.shape) != tuple(after[path].shape):
            raise StructureError(
                f"{path}: shape {tuple(leaf.shape)} in the base, {tuple(after[path].shape)} tuned"
            )


def _infer(path: str, leaf: Any, chosen: bool) -> KernelSpec:
    """The layout of a leaf; one that no rule chose is copied whole and may be anything."""
    shape = tuple(leaf.shape)
    if chosen:
        return infer(path, shape)
    try:
        return infer(path, shape)
    except PlanError:
        return KernelSpec.vector(len(shape))


def _plain(leaf: Any, depth: int) -> jax.Array:
    return over_stack(dense, depth)(leaf) if is_leaf(leaf) else jnp.asarray(leaf)


def _differs(change: Change) -> bool:
    before, after = (_plain(leaf, change.depth) for leaf in (change.before, change.after))
    return bool(np.any(jax.device_get(before) != jax.device_get(after)))
