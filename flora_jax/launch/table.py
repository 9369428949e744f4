"""``flora table``: the table of an experiment beside the paper's, a plot, and its claims checked.

``table.py`` of the experiment says what to show; every name in it is optional:

- ``metrics = {"accuracy": "Accuracy, %"}``: result -> heading, in order;
- ``label(bindings) -> str``: the name of a row;
- ``paper = {label: {metric: text}}``: the paper's figures, shown beside ours;
- ``part(bindings) -> str``: rows of one part stand in a table of their own, under that heading and
  with those of ``metrics`` that its runs have;
- ``plot(groups, axes)``: draws on matplotlib axes, on ``panels = 2`` of them side by side if set;
  ``x = "LoRA.rank"`` for curves over a binding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flora_jax.core.errors import ConfigError
from flora_jax.launch.checks import Group, collect, judge
from flora_jax.launch.experiment import Experiment
from flora_jax.training.run_dir import write_text


def varying(groups: Sequence[Group]) -> list[str]:
    """The bindings that are not the same in all groups."""
    names = dict.fromkeys(k for group in groups for k in group.bindings)
    return [k for k in names if len({str(g.bindings.get(k)) for g in groups}) > 1]


def default_label(groups: Sequence[Group]) -> Callable[[dict[str, Any]], str]:
    """Names a row by the bindings that vary."""
    names = varying(groups)

    def label(bindings: dict[str, Any]) -> str:
        parts = [f"{k.rsplit('.', 1)[-1]}={bindings[k]}" for k in names if k in bindings]
        return ", ".join(parts) or "all runs"

    return label


def number(value: float, half: float = math.nan) -> str:
    """``mean ± half`` with digits that fit the interval.

    >>> number(93.4567, 0.234), number(0.5), number(460800.0, 0.0), number(3.17e-9, 4e-10)
    ('93.46 ± 0.23', '0.5', '460,800', '3.2e-09 ± 4e-10')
    """
    if math.isnan(half) or half <= 1e-12 * abs(value):  # equal values, their mean rounded
        return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e} ± {half:.0e}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def _metrics(module: ModuleType | None, groups: Sequence[Group]) -> dict[str, str]:
    shown = getattr(module, "metrics", None)
    results = [result for group in groups for result in group.results.values()]
    if shown:
        return {k: v for k, v in shown.items() if any(k in result for result in results)}
    return {
        name: name
        for name, value in results[0].items()
        if isinstance(value, (int, float)) and all(name in result for result in results)
    }


def markdown(groups: Sequence[Group], module: ModuleType | None) -> str:
    """Markdown: one row a setting, mean ± 95 % interval over seeds, the paper's figure beside.

    One table, or one a part.
    """
    part = getattr(module, "part", None)
    if part is None:
        return _one_table(groups, module)
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(part(dict(group.bindings)), []).append(group)
    return "\n".join(f"## {name}\n{_one_table(parts[name], module)}" for name in parts)


def _one_table(groups: Sequence[Group], module: ModuleType | None) -> str:
    metrics = _metrics(module, groups)
    label = getattr(module, "label", None) or default_label(groups)
    paper = getattr(module, "paper", {})
    headings = ["setting", "seeds"]
    for name, heading in metrics.items():
        headings += [heading] + ([f"{heading} (paper)"] if _in_paper(paper, name) else [])
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for group in groups:
        name = label(dict(group.bindings))
        cells = [name, str(len(group.results))]
        for metric in metrics:
            cells.append(number(group.mean(metric), group.interval(metric)))
            if _in_paper(paper, metric):
                cells.append(str(paper.get(name, {}).get(metric, "")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _in_paper(paper: dict[str, dict[str, Any]], metric: str) -> bool:
    return any(metric in figures for figures in paper.values())


def draw(groups: Sequence[Group], module: ModuleType | None, path: Path) -> None:
    """The experiment's plot as PNG: its own, curves over ``x``, or bars with intervals."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    del matplotlib
    panels = getattr(module, "panels", 1)
    figure = Figure(figsize=(7 if panels == 1 else 5.5 * panels, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    metric, heading = next(iter(_metrics(module, groups).items()))
    if hasattr(module, "plot"):
        module.plot(groups, axes)
    elif hasattr(module, "x"):
        _curves(groups, module, axes, metric)
        axes.set_ylabel(heading)
    else:
        label = getattr(module, "label", None) or default_label(groups)
        names = [label(dict(group.bindings)) for group in groups]
        halves = [_zero(group.interval(metric)) for group in groups]
        axes.barh(names, [group.mean(metric) for group in groups], xerr=halves)
        axes.invert_yaxis()
        axes.set_xlabel(heading)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _zero(half: float) -> float:
    return 0.0 if math.isnan(half) else half


def _curves(groups: Sequence[Group], module: ModuleType, axes: Any, metric: str) -> None:
    """One curve for each setting of the other bindings, over the binding or metric ``x``."""
    names = [name for name in varying(groups) if name != module.x]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for group in groups:
        if module.x in group.bindings:
            x = group.bindings[module.x]
        else:
            x = group.mean(module.x)
        label = ", ".join(f"{k.rsplit('.', 1)[-1]}={group.bindings.get(k)}" for k in names)
        point = (x, group.mean(metric), _zero(group.interval(metric)))
        curves.setdefault(label, []).append(point)
    for label, points in curves.items():
        xs, ys, halves = zip(*sorted(points))
        axes.errorbar(xs, ys, yerr=halves, marker="o", capsize=3, label=label)
    axes.set_xlabel(module.x)
    if len(curves) > 1:
        axes.legend()


def table(
    experiment: Experiment,
    out: str | Path,
    *,
    extra: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> int:
    """Prints and saves table, plot and verdicts; returns how many claims fail.

    Writes ``table.md`` and ``plot.png`` into ``out``.

    Raises:
      ConfigError: no run is finished, or a check is malformed.
    """
    out = Path(out)
    groups, missing = collect(experiment.runs(extra, search_paths), out)
    if not groups:
        raise ConfigError(
            f"no run of {experiment.name} is finished in {out}; "
            f"start them with: flora sweep --experiment {experiment.name}"
        )
    module = experiment.module("table")
    text = markdown(groups, module)
    verdicts = [judge(check, groups) for check in experiment.expected()]
    lines = "".join(f"- {verdict.line}\n" for verdict in verdicts)
    note = f"\n{len(missing)} runs are not finished: {', '.join(missing)}\n" if missing else ""
    report = f"# {experiment.name}\n\n{text}\n{lines}{note}"
    write_text(out / "table.md", report)
    draw(groups, module, out / "plot.png")
    print(report, end="")
    print(f"\nwritten: {out / 'table.md'}, {out / 'plot.png'}")
    return sum(not verdict.holds for verdict in verdicts) + len(missing)
