"""``fit``: the training loop with logging, evaluation, checkpoints, resume and a clean stop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flora_jax.core.calibrate import data_dependent
from flora_jax.core.errors import ConfigError
from flora_jax.core.plan import Plan
from flora_jax.core.registry import name_of
from flora_jax.training import distributed, sharding
from flora_jax.training.checkpoint import Checkpointer, Identity, fingerprint
from flora_jax.training.losses import Loss
from flora_jax.training.members import (
    Members,
    alive,
    make_members_evaluator,
    make_members_step,
    member,
    spread,
)
from flora_jax.training.metrics import MetricWriter, Progress
from flora_jax.training.optim import AdamW
from flora_jax.training.place import Layout
from flora_jax.training.run_dir import RunDir, RunError
from flora_jax.training.state import TrainState, fresh_state
from flora_jax.training.step import make_evaluator, make_step, trouble
from flora_jax.training.stopping import EarlyStopping, Sigterm

Eval = Callable[[TrainState, Any], Mapping[str, float]]
LAG = 2  # steps in flight before the host looks at an old one: devices never wait for the check


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Args:
      state: the last state.
      status: ``done`` or ``preempted`` (SIGTERM; run again to go on).
      reason: ``steps``, ``early stopping``, ``data exhausted`` or ``SIGTERM``.
      metrics: the last logged line.
    """

    state: TrainState
    status: str
    reason: str
    metrics: Mapping[str, Any]

    @property
    def adapters(self) -> Any:
        return self.state.adapters


def fit(
    loss: Loss,
    plan: Plan,
    base: Any,
    data: Any,
    *,
    steps: int,
    run_dir: str | Path,
    optimizer: Any = None,
    adapters: Any = None,
    seed: int = 0,
    accumulate: int = 1,
    clip: float | None = 1.0,
    log_every: int = 10,
    save_every: int | None = None,
    keep: int = 2,
    best: str | None = None,
    best_mode: str = "min",
    evals: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    early_stopping: EarlyStopping | None = None,
    members: Members | None = None,
    mesh: Any = None,
    rules: Any = sharding.LLAMA_RULES,
    resume: bool = True,
    identity: str = "",
    base_source: str = "",
    tensorboard: bool = True,
    progress: bool = True,
) -> FitResult:
    """Trains adapters on a frozen base; the same call resumes a stopped run bit for bit.

    Args:
      loss: ``loss(bound, batch, rng, train) -> (sum, weight, aux)``.
      base: frozen parameters; placed by ``rules`` when there is a mesh.
      data: batches (dicts of arrays, this process's rows): a grain data set, loader or iterator, or
        any iterable. ``get_state``/``set_state`` of its iterator are used; without them a resumed
        run skips the batches already seen.
      steps: optimizer steps in all.
      run_dir: the run's folder (:class:`RunDir`).
      optimizer: AdamW(1e-3) by default.
      adapters: initial adapters; fresh ones from ``seed`` by default, which a plan whose methods
        start from data cannot do without.
      accumulate, clip: see :func:`make_step`.
      log_every, save_every, eval_every: in steps; the last step is always logged, saved and (with
        evals) evaluated.
      keep, best, best_mode: the last ``keep`` checkpoints and the best by ``best`` stay.
      evals: ``{name: eval}``; an eval is a re-iterable of batches (the loss is averaged over it) or
        ``f(state, base) -> {metric: value}``. Results are logged as ``name/metric``.
      members: several runs in one program (:class:`Members`, in place of ``seed``). The state is
        stacked; a logged figure is the mean of the members still going, ``<figure>/i`` that of
        member i; a member that is not finite stops alone, and the run only with the last one.
      mesh: from :func:`make_mesh`; the batch is split over its data-like axes.
      rules: sharding rules of the base; adapters and optimizer state are derived.
      resume: go on from the newest checkpoint in ``run_dir``; False refuses a used folder.
      identity: tells runs apart, e.g. a hash of the configuration.

    Raises:
      RunError: a non-finite loss or gradient (the last good checkpoint stays); a folder or
        checkpoint of another run, plan or base; a full disk.
    """
    if steps < 1 or log_every < 1:
        raise ConfigError(f"steps={steps} and log_every={log_every} must be positive")
    if (evals or early_stopping or best) and not (evals and eval_every):
        raise ConfigError("evals and eval_every go together; best and early_stopping need both")
    if adapters is None:
        _check_start(plan)
    optimizer = AdamW() if optimizer is None else optimizer
    run = _claim(run_dir, identity, resume)
    owner = Identity(
        plan=plan,
        base_fingerprint=fingerprint(base),
        base_source=base_source,
        members="" if members is None else members.to_json(),
    )

    def fresh() -> TrainState:
        if members is None:
            return fresh_state(plan, base, optimizer, seed, adapters)
        return members.states(plan, base, optimizer, adapters)

    layout = Layout.of(plan, base, fresh, mesh, rules, members)
    options = {"accumulate": accumulate, "clip": clip, "shardings": layout.state}
    if members is None:
        step = make_step(loss, plan, optimizer, **options)
    else:
        step = make_members_step(loss, plan, optimizer, members, **options)
    best_of = {"best": best, "mode": best_mode}
    saver = Checkpointer(run.checkpoints, owner, keep=keep, **best_of)
    with saver, Sigterm() as sigterm:
        loop = _Loop(
            run=run,
            saver=saver,
            stream=iter(data),
            layout=layout,
            step=step,
            base=layout.place_base(base),
            evals=_evals(evals, loss, plan, layout, members),
            steps=steps,
            every={"log": log_every, "save": save_every, "eval": eval_every},
            stopping=early_stopping,
            writer=MetricWriter(run if distributed.is_main() else None, tensorboard),
            sigterm=sigterm,
            members=members,
        )
        return loop.run_to_end(fresh, progress and distributed.is_main())


def _check_start(plan: Plan) -> None:
    """Raise ConfigError where fresh adapters need statistics of the data."""
    needy = data_dependent(plan)
    if needy:
        raise ConfigError(
            f"{needy[0].path}: {name_of(needy[0].adapter)} starts from its inputs; pass fit "
            "adapters=flora.init(plan, key, base, stats=flora.calibrate(...))"
        )


def _claim(path: str | Path, identity: str, resume: bool) -> RunDir:
    if distributed.is_main():
        return RunDir.claim(path, identity=identity, resume=resume)
    return RunDir(Path(path), identity)


def _evals(
    evals: Any, loss: Loss, plan: Plan, layout: Layout, members: Members | None
) -> dict[str, Eval]:
    mean = make_evaluator(loss, plan) if members is None else make_members_evaluator(loss, plan)

    def over(batches: Any) -> Eval:
        return lambda state, base: mean(state, base, map(layout.place_batch, batches))

    return {name: e if callable(e) else over(e) for name, e in (evals or {}).items()}


@dataclasses.dataclass
class _Loop:
    """The moving parts of one :func:`fit` call."""

    run: RunDir
    saver: Checkpointer
    stream: Any
    layout: Layout
    step: Callable
    base: Any
    evals: dict[str, Eval]
    steps: int
    every: Mapping[str, int | None]
    stopping: EarlyStopping | None
    writer: MetricWriter
    sigterm: Sigterm
    members: Members | None = None
    stopped: dict[int, int] = dataclasses.field(default_factory=dict)
    told: float = 0.0
    since: tuple[float, int] | None = None
    line: dict[str, Any] = dataclasses.field(default_factory=dict)
    pending: collections.deque = dataclasses.field(default_factory=collections.deque)
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def run_to_end(self, fresh: Callable[[], TrainState], show: bool) -> FitResult:
        # a refused checkpoint leaves the folder, status included, as it was
        state = self._start(fresh)
        self.progress = Progress(self.steps, state.done, show=show)
        try:
            self._status("running", state.done)
            state, reason = self._steps(state)
            self._save(state)
            self.saver.wait()
            status = "preempted" if reason == "SIGTERM" else "done"
            self._status(status, state.done, reason=reason)
            self.progress.say(f"{status} at step {state.done}: {reason}")
            return FitResult(state, status, reason, self.line)
        except BaseException as error:
            with contextlib.suppress(RunError):  # a full disk must not hide its own message
                self._status("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.writer.close()
            self.progress.close()

    def _start(self, fresh: Callable[[], TrainState]) -> TrainState:
        """The newest checkpoint with data and metrics wound back to it, or a fresh state."""
        if self.saver.latest() is None:
            if distributed.is_main():
                self.run.rewind_metrics(0)
            return self.layout.place_state(fresh())
        movable = hasattr(self.stream, "set_state")
        state = self.saver.restore(self.layout.abstract, self.stream if movable else None)
        done = state.done
        if self.members is not None:
            behind = np.flatnonzero(~alive(state))
            self.stopped = {int(i): int(state.step[i]) + 1 for i in behind}
        if not movable:
            collections.deque(zip(range(done), self.stream), maxlen=0)
        if distributed.is_main():
            self.run.rewind_metrics(done)
        for line in self.run.metrics():
            self._remember({k: v for k, v in line.items() if k.partition("/")[0] in self.evals})
        return state

    def _steps(self, state: TrainState) -> tuple[TrainState, str]:
        done, reason = state.done, "steps"
        if self._exhausted():
            return state, "early stopping"
        while done < self.steps:
            try:
                batch = next(self.stream)
            except StopIteration:
                reason = "data exhausted"
                break
            state, metrics = self.step(state, self.base, self.layout.place_batch(batch))
            done += 1
            self.pending.append((done, metrics))
            self.progress.advance(done)
            if len(self.pending) > LAG:
                self._check(*self.pending.popleft())
            if self.since is None:  # the first step compiles: the clock starts after it
                jax.block_until_ready(metrics)
                self.since = (time.perf_counter(), done)
            if self._due("log", done):
                stop = self._report(state, done, metrics, batch)
                if stop or distributed.agree(self.sigterm.arrived):
                    reason = stop or "SIGTERM"
                    break
            elif self._due("save", done):
                self._drain()
                self._save(state)
            if self.sigterm.arrived and jax.process_count() == 1:
                reason = "SIGTERM"
                break
        self._drain()
        return state, reason

    def _due(self, what: str, step: int) -> bool:
        """Logging and evaluation are due at the end, logging at evaluations, too."""
        every = self.every[what]
        if what == "log" and (step == self.steps or self._due("eval", step)):
            return True
        return bool(every) and (step % every == 0 or (what == "eval" and step == self.steps))

    def _check(self, step: int, metrics: Any) -> None:
        """Stops the run when a step was not finite; its state was left as it had been."""
        ok = np.asarray(metrics["ok"])
        if ok.all():
            return
        if self.members is not None:
            self._note_stopped(step, metrics, ok)
            if ok.any():
                return
            metrics = member(metrics, max(self.stopped, key=self.stopped.get))
        self.saver.wait()
        raise RunError(
            f"step {step}: {trouble(metrics)}; last good checkpoint: step {self.saver.latest()}"
        )

    def _note_stopped(self, step: int, metrics: Any, ok: np.ndarray) -> None:
        """Says which members this step was the last of."""
        for index in map(int, np.flatnonzero(~ok)):
            if index not in self.stopped:
                self.stopped[index] = step
                self.progress.say(
                    f"step {step}: member {index} stops: {trouble(member(metrics, index))}"
                )

    def _drain(self) -> None:
        while self.pending:
            self._check(*self.pending.popleft())

    def _report(self, state: TrainState, step: int, metrics: Any, batch: Any) -> str | None:
        """Logs a step, evaluates and saves what is due; the reason to stop, if any."""
        self._drain()
        values = {k: v for k, v in metrics.items() if k not in ("ok", "bad")}
        good = np.ones(()) if self.members is None else alive(state)
        self.line = spread(jax.device_get(values), good)
        self.line |= self._throughput(step, batch)
        found, improved = {}, False
        if self._due("eval", step):
            found = self._evaluate(state)
            improved = self._remember(found)
            self.line |= found
            self.since = (time.perf_counter(), step)
        # the line first: a checkpoint without its line could not be resumed bit for bit
        self.writer.write(step, self.line)
        self.progress.report(step, self.line)
        if time.monotonic() - self.told > 1.0:  # each write waits for the disk
            self._status("running", step, loss=self.line["loss"])
            self.told = time.monotonic()
        if improved or self._due("save", step) or step == self.steps:
            self._save(state, found)
        return "early stopping" if found and self._exhausted() else None

    def _exhausted(self) -> bool:
        if self.stopping is None:
            return False
        return self.stopping.exhausted(self.history.get(self.stopping.metric, ()))

    def _throughput(self, step: int, batch: Any) -> dict[str, float]:
        now = time.perf_counter()
        (then, first), self.since = self.since, (now, step)
        if step == first:
            return {}
        seconds = max(now - then, 1e-9) / (step - first)
        unit = "tokens" if "tokens" in batch else "examples"
        shape = next(iter(batch.values())).shape if unit == "examples" else batch["tokens"].shape
        count = 1 if self.members is None else len(self.members)
        shape = shape[1:] if self.members is not None and self.members.batches == "own" else shape
        rows = count * shape[0] * (shape[1] if unit == "tokens" else 1) * jax.process_count()
        return {"perf/seconds_per_step": seconds, f"perf/{unit}_per_s": rows / seconds}

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        found = {}
        for name, evaluate in self.evals.items():
            results = evaluate(state, self.base)
            results = {f"{name}/{metric}": value for metric, value in results.items()}
            found |= spread(results, np.ones(()) if self.members is None else alive(state))
        for metric in (self.saver.best, self.stopping and self.stopping.metric):
            if metric and metric not in found:
                raise ConfigError(f"no metric {metric!r}; the evals give {', '.join(found)}")
        return found

    def _remember(self, found: Mapping[str, float]) -> bool:
        """Adds evaluation results to the history; whether ``best`` improved."""
        for name, value in found.items():
            self.history.setdefault(name, []).append(float(value))
        values = self.history.get(self.saver.best, []) if self.saver.best in found else []
        pick = min if self.saver.mode == "min" else max
        return bool(values) and values[-1] == pick(values) and values[-1] not in values[:-1]

    def _save(self, state: TrainState, found: Mapping[str, float] | None = None) -> None:
        movable = hasattr(self.stream, "get_state")
        self.saver.save(state, self.stream if movable else None, found)

    def _status(self, state: str, step: int | None = None, **fields: Any) -> None:
        if distributed.is_main():
            known = {} if step is None else {"step": step, "steps": self.steps}
            self.run.write_status(state=state, **known, **fields)
