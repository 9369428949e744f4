"""Aggregates runs over seeds and checks the orderings that ``expected.json`` claims."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.launch.execute import finished
from flora_jax.launch.experiment import Run
from flora_jax.training.run_dir import RunDir

COMPARE = {
    "ge": (">=", lambda left, right, margin: left >= right - margin),
    "gt": (">", lambda left, right, margin: left > right + margin),
    "le": ("<=", lambda left, right, margin: left <= right + margin),
    "lt": ("<", lambda left, right, margin: left < right - margin),
    "near": ("~", lambda left, right, margin: abs(left - right) <= margin),
}
REDUCE = {"mean": np.mean, "max": np.max, "min": np.min}
KEYS = {"check", "metric", "left", "right", "margin", "reduce", "at_least", "why"}


def is_seed(binding: str) -> bool:
    """Whether a binding is a seed: what runs are averaged over.

    >>> is_seed("train.seed"), is_seed("Digits.split_seed"), is_seed("LoRA.rank")
    (True, True, False)
    """
    return binding.rsplit(".", 1)[-1].endswith("seed")


@dataclasses.dataclass(frozen=True)
class Group:
    """The finished runs of one setting, one per seed.

    Attributes:
      bindings: the setting, without seeds.
      results: ``{seeds: result}``.
    """

    bindings: Mapping[str, Any]
    results: Mapping[tuple[Any, ...], Mapping[str, Any]]

    def values(self, metric: str) -> np.ndarray:
        """The metric of every seed, in order of seeds.

        Raises:
          ConfigError: a run has no such metric.
        """
        for result in self.results.values():
            if metric not in result:
                raise ConfigError(unknown("metric", metric, result))
        return np.array([self.results[s][metric] for s in self.results], np.float64)

    def mean(self, metric: str) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values(metric)))

    def interval(self, metric: str) -> float:
        """Half width of the 95 % confidence interval: ``t(0.975, n-1) s / sqrt(n)``.

        NaN for a single seed.
        """
        values = self.values(metric)
        if len(values) < 2:
            return math.nan
        spread = np.std(values, ddof=1) / math.sqrt(len(values))
        return float(stats.t.ppf(0.975, len(values) - 1) * spread)


def collect(runs: Sequence[Run], out: str | Path) -> tuple[list[Group], list[str]]:
    """Finished runs grouped by setting, in the order of the sweep; and the ids not finished."""
    settings: dict[str, tuple[dict[str, Any], dict[tuple[Any, ...], Any]]] = {}
    missing = []
    for run in runs:
        status = RunDir(Path(out) / run.id).status()
        if not finished(status):
            missing.append(run.id)
            continue
        setting = {k: v for k, v in run.bindings.items() if not is_seed(k)}
        seeds = tuple(v for k, v in run.bindings.items() if is_seed(k))
        key = json.dumps(setting, sort_keys=True, default=str)
        settings.setdefault(key, (setting, {}))[1][seeds] = status["result"]
    return [Group(setting, results) for setting, results in settings.values()], missing


def select(groups: Sequence[Group], wanted: Mapping[str, Any]) -> list[Group]:
    """The groups whose bindings include ``wanted``.

    Raises:
      ConfigError: none does.
    """

    # JSON has no tuples: a list in expected.json stands for either.
    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value, default=str))

    found = [
        group
        for group in groups
        if all(
            k in group.bindings and plain(group.bindings[k]) == plain(v) for k, v in wanted.items()
        )
    ]
    if not found:
        settings = [json.dumps(plain(group.bindings)) for group in groups]
        raise ConfigError(unknown("setting", json.dumps(wanted), settings))
    return found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a check holds, and the line that says so."""

    holds: bool
    line: str


def judge(check: Mapping[str, Any], groups: Sequence[Group]) -> Verdict:
    """One check of ``expected.json`` against the groups; the format is in docs/config.md.

    Raises:
      ConfigError: the check is malformed or selects nothing.
    """
    for key in check.keys() - KEYS:
        raise ConfigError(unknown("key of a check", key, KEYS))
    for key in ("check", "metric", "left", "right"):
        if key not in check:
            raise ConfigError(f"a check needs {key!r}: {dict(check)}")
    kind, metric, margin = check["check"], check["metric"], check.get("margin", 0.0)
    if kind == "wins":
        return _judge_wins(check, groups)
    if kind not in COMPARE:
        raise ConfigError(unknown("check", kind, [*COMPARE, "wins"]))
    sign, holds = COMPARE[kind]
    left, left_text = _side(check["left"], groups, check)
    right, right_text = _side(check["right"], groups, check)
    good = bool(holds(left, right, margin))
    line = f"{metric}: {left_text} {sign} {right_text}" + (f" (margin {margin})" if margin else "")
    return _verdict(good, line, check)


def _side(side: Any, groups: Sequence[Group], check: Mapping[str, Any]) -> tuple[float, str]:
    """The number that a side stands for, and how to show it."""
    if isinstance(side, (int, float)):
        return float(side), f"{side:g}"
    metric, found = check["metric"], select(groups, side)
    name = ", ".join(f"{k}={v}" for k, v in side.items()) or "all"
    if len(found) == 1:
        mean, half = found[0].mean(metric), found[0].interval(metric)
        return mean, f"[{name}] {mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")
    reduce = check.get("reduce")
    if reduce not in REDUCE:
        raise ConfigError(
            f'{side} selects {len(found)} settings: name one, or set "reduce" to '
            f"{', '.join(REDUCE)}"
        )
    value = float(REDUCE[reduce]([group.mean(metric) for group in found]))
    return value, f"{reduce} of [{name}] {value:.4g}"


def _judge_wins(check: Mapping[str, Any], groups: Sequence[Group]) -> Verdict:
    """In at least so many seeds the left run is above the right one (paired by seed)."""
    metric, margin = check["metric"], check.get("margin", 0.0)
    (left, *more_left), (right, *more_right) = (
        select(groups, check[side]) for side in ("left", "right")
    )
    if more_left or more_right:
        raise ConfigError(f"a check of wins compares two settings: {dict(check)}")
    ours, theirs = (dict(zip(g.results, g.values(metric))) for g in (left, right))
    shared = [seed for seed in ours if seed in theirs]
    wins = sum(bool(ours[seed] > theirs[seed] + margin) for seed in shared)
    needed = check.get("at_least", len(shared))
    names = [", ".join(f"{k}={v}" for k, v in check[side].items()) for side in ("left", "right")]
    count = f"{wins} of {len(shared)} seeds, {needed} needed"
    line = f"{metric}: [{names[0]}] > [{names[1]}] in {count}"
    return _verdict(wins >= needed, line, check)


def _verdict(holds: bool, line: str, check: Mapping[str, Any]) -> Verdict:
    why = f"  ({check['why']})" if check.get("why") else ""
    return Verdict(holds, f"{'holds' if holds else 'FAILS'}  {line}{why}")
