"""The entry point ``train``: adapt a model to data and judge it before and after.

Its arguments are the object graph that a gin file describes; called from Python it needs no gin.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora_jax import training
from flora_jax.adapters import Replace
from flora_jax.config import entry_point
from flora_jax.core.adapter import Adapter
from flora_jax.core.errors import ConfigError
from flora_jax.core.plan import Plan
from flora_jax.core.registry import method_of
from flora_jax.launch import setup as setups
from flora_jax.launch.execute import Preempted
from flora_jax.launch.measure import step_cost
from flora_jax.launch.subjects import Source
from flora_jax.training.run_dir import RunDir, write_text


def train(
    *,
    model: Source,
    data: Any,
    rules: Mapping[str, Adapter | None],
    optimizer: training.Optimizer | training.Groups | None = None,
    steps: int = 100,
    batch_size: int = 8,
    accumulate: int = 1,
    clip: float | None = 1.0,
    seed: int = 0,
    base_dtype: str | None = None,
    quantize: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    sharding: Mapping[str, tuple] | None = None,
    log_every: int = 10,
    eval_every: int | None = None,
    early_stopping: training.EarlyStopping | None = None,
    eval_batches: int | None = None,
    eval_batch_size: int | None = None,
    checkpoint_every: int | None = None,
    calibration_data: Any = None,
    calibration_batches: int = 8,
    prompt: str = "The",
    sample_tokens: int = 24,
    measure: bool = False,
    loss_at: tuple[int, ...] = (),
    out: str | None = None,
) -> dict[str, float]:
    """Trains adapters on a frozen model; prints and returns the figures before and after.

    Args:
      model: what is adapted: ``LanguageModel``, ``TextClassifier``, ``SmallImageModel`` ...
      data: ``TextData``, ``ClassificationData``, ``ImageData`` ...
      rules: ordered ``{path regex: adapter}``; the first match wins, None leaves a weight alone.
      optimizer: of the adapters, by default ``AdamW(learning_rate=1e-3)``; its learning rate is a
        number or a schedule.
      steps: optimizer steps.
      batch_size: examples (rows of text) a step, over all devices.
      accumulate: micro-batches that a step is cut into, to save memory.
      clip: largest global norm of the gradient, or None.
      seed: of adapters, order of the data and dropout.
      base_dtype: the frozen base is cast to it, e.g. ``bfloat16``.
      quantize: ``{path regex: Format}``: the base is held in low bits.
      mesh: ``{axis: size}`` for several devices, e.g. ``{'data': -1}``; None is one device.
      sharding: ``{path regex: (mesh axis or None, ...)}`` of the base; a default for Llama.
      log_every: write the metrics each so many steps.
      eval_every: judge on the held-out data each so many steps too.
      early_stopping: stop when a held-out figure stops improving; needs ``eval_every``.
      eval_batches: only so many held-out batches.
      eval_batch_size: of held-out batches; ``batch_size`` by default.
      checkpoint_every: save each so many steps too; the last step is always saved.
      calibration_data: what methods that protect old knowledge (KORE) read; by default the task
        that a small base was made for, else ``data``. EVA always reads ``data``.
      calibration_batches: training batches that a data-dependent start reads, at most; other
        methods read none.
      prompt, sample_tokens: a language model continues the prompt before and after.
      loss_at: report the training loss of these steps too, as ``loss_at_<step>``; each has to be
        one that ``log_every`` logs.
      measure: report ``peak_bytes`` and ``temp_bytes`` of the compiled step too (a second compile).
      out: the run folder; None keeps nothing.

    Returns:
      ``perplexity`` or ``accuracy`` and its ``..._before``; on the task that a small base was made
      for ``retention`` (accuracy) and ``forgetting`` (its cross-entropy after minus before);
      ``trained`` numbers (those that a step moves) and how many of them are ``trained_adapters``
      (not weights trained whole, such as a fresh head); ``parameters`` of the model,
      ``adapter_bytes`` of a checkpoint; ``seconds``, ``seconds_per_step``.
    """
    options = complete(locals())
    with contextlib.ExitStack() as stack:
        folder = out or stack.enter_context(tempfile.TemporaryDirectory())
        setup = setups.build(options, Path(folder))
        print(setup.table())
        write_text(Path(folder) / "plan.txt", setup.table() + "\n")
        write_text(Path(folder) / "plan.json", setup.plan.to_json() + "\n")
        before = setup.judge(setup.state)
        _report("before", before, setup.sample(setup.state))
        started = time.time()
        result = _fit(setup, folder)
        seconds = time.time() - started
        early = _losses(RunDir(Path(folder)), options["loss_at"])
    after = setup.judge(result.state)
    _report("after", after, setup.sample(result.state))
    retained = _retained(setup, result.state)
    if out is not None:
        print(_next_commands(out, setup))
    figures = {**after, **{f"{k}_before": v for k, v in before.items()}}
    counts = _counts(setup) | early
    counts |= {"parameters": setup.parameters, "adapter_bytes": _adapter_bytes(setup.plan)}
    if options["measure"]:
        cost = step_cost(setup)
        counts |= {name: cost[name] for name in ("peak_bytes", "temp_bytes")}
    return {**figures, **retained, **counts, "seconds": seconds, **_speed(result.metrics)}


def _retained(setup: setups.Setup, state: training.TrainState) -> dict[str, float]:
    """What is left of the task that the base was made for; empty if there is none."""
    retention = setup.subject.retention
    if retention is None or setup.per_example:
        return {}
    before, after = retention(setup.base), retention(setup.bound(state))
    print(f"retention: {after['retention']:.2f} % (before {before['retention']:.2f} %)")
    forgetting = after["retention_nll"] - before["retention_nll"]
    return {**after, "retention_before": before["retention"], "forgetting": forgetting}


def _losses(run: RunDir, steps: Sequence[int]) -> dict[str, float]:
    """The logged training losses of some steps."""
    logged = {line["step"]: line["loss"] for line in run.metrics()}
    for step in steps:
        if step not in logged:
            near = sorted(logged, key=lambda s: abs(s - step))[:3]
            raise ConfigError(f"train.loss_at: step {step} is not logged; nearest: {near}")
    return {f"loss_at_{step}": logged[step] for step in steps}


def _adapter_bytes(plan: Plan) -> int:
    """Bytes of the adapters' arrays in a checkpoint, frozen ones included."""
    arrays = (array for owner in plan.owners for array in (*owner.train, *owner.frozen))
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in arrays)


def _counts(setup: setups.Setup) -> dict[str, int]:
    """Trained numbers, and those of them that are not of a weight trained whole."""
    trained = setup.trained()
    whole = [
        owner.path
        for owner in setup.plan.owners
        if isinstance(owner.adapter, Replace) and trained[owner.path] == owner.count
    ]
    total = sum(trained.values())
    return {"trained": total, "trained_adapters": total - sum(trained[path] for path in whole)}


def _fit(setup: setups.Setup, folder: str) -> training.FitResult:
    options, subject = setup.options, setup.subject
    judged = {"eval": setup.held_out()} if options["eval_every"] else None
    result = training.fit(
        subject.loss,
        setup.plan,
        setup.base,
        setup.batches(),
        steps=options["steps"],
        run_dir=folder,
        optimizer=options["optimizer"],
        adapters=setup.state.adapters,
        seed=options["seed"],
        accumulate=options["accumulate"],
        clip=options["clip"],
        log_every=options["log_every"],
        save_every=options["checkpoint_every"],
        evals=judged,
        eval_every=options["eval_every"],
        early_stopping=options["early_stopping"],
        mesh=setup.mesh,
        rules=setup.rules,
        base_source=subject.name,
    )
    if result.status == "preempted":
        raise Preempted(f"stopped by {result.reason} at step {int(result.state.step)}")
    return result


def _speed(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {key.removeprefix("perf/"): value for key, value in metrics.items()}
    wanted = ("tokens_per_s", "examples_per_s", "seconds_per_step")
    return {k: v for k, v in found.items() if k in wanted}


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`train`, defaults filled in."""
    defaults = inspect.signature(train).parameters.items()
    given = {k: p.default for k, p in defaults if p.default is not p.empty}
    filled = {**given, **options}
    return {**filled, "optimizer": filled["optimizer"] or training.AdamW(learning_rate=1e-3)}


def _report(when: str, figures: Mapping[str, float], text: str | None) -> None:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{when}: {numbers}", flush=True)
    if text is not None:
        print(f"{when}: {text!r}", flush=True)


def _next_commands(folder: str, setup: setups.Setup) -> str:
    """The exact commands that reload, merge and export the run."""
    lines = [f"run folder: {folder}", f"  flora eval --run {folder}"]
    if setup.subject.generates:
        lines.append(f'  flora generate --run {folder} --prompt "{setup.options["prompt"]}"')
    if all(method_of(entry.adapter).mergeable for entry in setup.plan):
        lines.append(f"  flora merge --run {folder} --out {folder}/merged")
    exports = all(method_of(entry.adapter).peft for entry in setup.plan)
    if hasattr(setup.subject.model, "to_hf") and exports:
        lines.append(f"  flora convert --run {folder} --out {folder}/peft")
    return "\n".join(lines)


entry_point(train)
