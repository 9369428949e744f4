"""Where metrics go: ``metrics.jsonl`` always, TensorBoard if installed, a bar or plain lines."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from flora_jax.training.run_dir import RunDir, disk_errors


class TensorBoard:
    """Scalars as an event file, through the ``tensorboard`` package alone."""

    def __init__(self, folder: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        with disk_errors(folder):
            self.writer = EventFileWriter(folder)

    @staticmethod
    def installed() -> bool:
        return importlib.util.find_spec("tensorboard") is not None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, (str, bool))}
        rows = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=rows))
        with disk_errors("TensorBoard events"):
            self.writer.add_event(event)
            self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MetricWriter:
    """One call per logged step; writes every sink. Only the main process has a run folder.

    Args:
      run: the run folder, or None (nothing is stored).
      tensorboard: write event files below the folder if the package is installed.
    """

    def __init__(self, run: RunDir | None, tensorboard: bool = True):
        self.run = run
        use = run is not None and tensorboard and TensorBoard.installed()
        self.board = TensorBoard(str(run.path / "tensorboard")) if use else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.append_metrics(step, values)
        if self.board is not None:
            self.board.write(step, values)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class Progress:
    """A bar with loss, throughput and time left on a terminal, plain lines otherwise.

    Args:
      steps: last step.
      start: steps already done.
      file: where to write; standard error by default.
      show: False is silent.
    """

    def __init__(self, steps: int, start: int = 0, file: TextIO | None = None, show: bool = True):
        self.steps, self.file, self.show = steps, file or sys.stderr, show
        self.bar = None
        if show and self.file.isatty():
            self.bar = tqdm(total=steps, initial=start, file=self.file, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Called every step; moves the bar only."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Called on logged steps."""
        if self.bar is not None:
            self.bar.set_postfix_str(" ".join(_texts(values)))
        elif self.show:
            seconds = values.get("perf/seconds_per_step")
            left = [] if seconds is None else [f"eta {clock(seconds * (self.steps - step))}"]
            words = [f"step {step}/{self.steps}", *_texts(values), *left]
            print("  ".join(words), file=self.file, flush=True)

    def say(self, text: str) -> None:
        """One line that does not break the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.file)
        elif self.show:
            print(text, file=self.file, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """``h:mm:ss``.

    >>> clock(3725)
    '1:02:05'
    """
    seconds = int(seconds) if math.isfinite(seconds) else 0
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _texts(values: Mapping[str, float]) -> list[str]:
    """The few figures a person watches."""
    words = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    rates = {u: values.get(f"perf/{u}_per_s") for u in ("tokens", "examples")}
    words += [f"{rate:,.0f} {unit}/s" for unit, rate in rates.items() if rate is not None]
    words += [f"{k} {v:.4f}" for k, v in values.items() if k.endswith("/loss")]
    return words
