"""The run folder: ``status.json``, ``metrics.jsonl``, ``checkpoints/``; one run per folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flora_jax.core.errors import FloraError

STATES = ("created", "running", "done", "preempted", "failed")


class RunError(FloraError):
    """A run folder, checkpoint or training run that cannot go on."""


@contextlib.contextmanager
def disk_errors(what: str | Path) -> Iterator[None]:
    """Turns a full disk (however a library words it) into one clear line about ``what``."""
    try:
        yield
    except Exception as error:  # tensorstore reports ENOSPC as text in a ValueError
        number = getattr(error, "errno", None)
        text = str(error)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
        if not (full or "RESOURCE_EXHAUSTED: Error writing" in text):
            raise
        raise RunError(f"disk full while writing {what}: {_free(what)}") from error


def _free(path: str | Path) -> str:
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return (
        f"{shutil.disk_usage(path).free / 2**20:.0f} MiB free; free some space and resume the run"
    )


def write_text(path: str | Path, text: str) -> None:
    """Writes to a temporary name beside ``path``, syncs, renames: never half-written.

    Raises:
      RunError: the disk is full.
    """
    path = Path(path)
    with disk_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _plain(value: Any) -> Any:
    """Numbers as Python's own (exact repr), non-finite ones as strings: strict JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


@dataclasses.dataclass(frozen=True)
class RunDir:
    """One run's folder; make it with :meth:`claim`.

    ``status.json`` holds ``state`` (one of ``STATES``), ``step``, ``steps``, ``updated`` (Unix
    seconds), ``identity`` and whatever else the writer adds;
    ``metrics.jsonl`` has one JSON object per logged step, floats exact (``repr``).
    """

    path: Path
    identity: str = ""

    @classmethod
    def claim(cls, path: str | Path, *, identity: str = "", resume: bool = True) -> RunDir:
        """Takes a new folder, or the folder of the same run when ``resume``.

        Args:
          path: the folder; made with its parents.
          identity: what tells runs apart, e.g. the hash of the configuration; "" claims a new
            folder and resumes any.
          resume: go on with what the folder holds.

        Raises:
          RunError: the folder holds another run, or a run and not ``resume``, or is a file.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"output folder {path} is a file")
        run = cls(path, identity)
        status = run.status()
        held = bool(status) or run.metrics_path.exists() or run.checkpoints.exists()
        if held and not resume:
            raise RunError(f"output folder {path} already holds a run; choose another or resume it")
        if identity and status.get("identity", identity) != identity:
            raise RunError(
                f"output folder {path} already holds another run (its identity is "
                f"{status['identity']!r}, this run's is {identity!r}); choose another folder"
            )
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        if not held:
            run.write_status(state="created")
        return run

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def status(self) -> dict[str, Any]:
        """``status.json`` as a dict; empty when there is none.

        Raises:
          RunError: the file is not JSON.
        """
        path = self.path / "status.json"
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is not JSON ({error}); is this the folder of a run?") from None

    def write_status(self, **fields: Any) -> None:
        """Merges ``fields`` into ``status.json``, atomically; ``state`` is one of ``STATES``."""
        if fields.get("state", "running") not in STATES:
            raise RunError(f"run state {fields['state']!r} is not one of {', '.join(STATES)}")
        status = {**self.status(), **_plain(fields), "updated": time.time()}
        if self.identity:
            status["identity"] = self.identity
        write_text(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``; readers ignore one that a kill cut short."""
        line = json.dumps({"step": int(step), **_plain(values)})
        with disk_errors(self.metrics_path), open(self.metrics_path, "a") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a kill is dropped."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text().split("\n")[
            :-1
        ]  # what follows the last newline is cut
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise RunError(f"{self.metrics_path} line {number} is not JSON") from None
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after ``step``: a resumed run writes them again, bit for bit."""
        if self.metrics_path.exists():
            kept = [json.dumps(line) for line in self.metrics() if line["step"] <= step]
            write_text(self.metrics_path, "".join(line + "\n" for line in kept))
