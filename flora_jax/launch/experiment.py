"""An experiment folder: ``base.gin``, ``sweep.py``, ``table.py``, ``expected.json``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flora_jax import config
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.launch.execute import run_hash


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      id: hash of the whole configuration; also the name of its folder.
      bindings: what the sweep varies, ``{gin name: value}``.
      arguments: the same as command-line bindings ``NAME=VALUE``.
    """

    id: str
    bindings: Mapping[str, Any]
    arguments: tuple[str, ...]


def gin_text(value: Any) -> str:
    """A Python value as gin text; a string that starts with ``@`` or ``%`` is a reference.

    >>> gin_text({"x": ("@LoRA()", 3, "word")})
    "{'x': (@LoRA(), 3, 'word',)}"
    """
    if isinstance(value, str):
        return value if value[:1] in ("@", "%") else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {gin_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{gin_text(v)}, " for v in value).rstrip() + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(gin_text, value)) + "]"
    return repr(value)


def experiments_folders() -> tuple[Path, ...]:
    """Where experiments are looked for by name: the package, then a source checkout."""
    package = Path(__file__).resolve().parent.parent
    return tuple(p for p in (package / "experiments", package.parent / "experiments") if p.is_dir())


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment's folder; find one by name or path with :meth:`find`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def find(cls, name: str | Path) -> Experiment:
        """The experiment of that name, or in the folder of that path.

        Raises:
          ConfigError: there is none; names the nearest.
        """
        for folder in (Path(), *experiments_folders()):
            if (folder / name / "sweep.py").is_file():
                return cls((folder / name).resolve())
        names = [p.parent.name for f in experiments_folders() for p in f.glob("*/sweep.py")]
        raise ConfigError(unknown("experiment", str(name), names))

    def module(self, name: str) -> ModuleType | None:
        """``sweep.py`` or ``table.py`` as a module; None if the file does not exist."""
        path = self.path / f"{name}.py"
        return _load(path) if path.is_file() else None

    @property
    def entry(self) -> str:
        """The entry point that its runs call; ``train`` unless ``sweep.py`` sets ``entry``."""
        return getattr(self.module("sweep"), "entry", "train")

    def load(self, arguments: Sequence[str], search_paths: Sequence[str] = ()) -> config.Config:
        """The configuration of one run: ``base.gin`` and its bindings."""
        self.module("sweep")
        return config.load([self.path / "base.gin"], arguments, [self.path, *search_paths])

    def runs(self, extra: Sequence[str] = (), search_paths: Sequence[str] = ()) -> list[Run]:
        """Every run of ``sweep()``; each configuration is parsed here, before any is started.

        Args:
          extra: bindings ``NAME=VALUE`` laid over each run, e.g. fewer steps for a trial.
          search_paths: more folders for gin files.

        Raises:
          ConfigError: ``sweep`` is missing, a configuration is wrong, two runs are the same.
        """
        sweep = getattr(self.module("sweep"), "sweep", None)
        if sweep is None:
            raise ConfigError(f"{self.path / 'sweep.py'} defines no function sweep()")
        runs: dict[str, Run] = {}
        for bindings in _pairs(sweep()):
            arguments = (*(f"{k}={gin_text(v)}" for k, v in bindings.items()), *extra)
            loaded = self.load(arguments, search_paths)
            run = Run(run_hash(loaded, self.entry), bindings, arguments)
            if run.id in runs:
                twin = dict(runs[run.id].bindings)
                raise ConfigError(f"sweep() gives the same run twice: {twin} and {bindings}")
            runs[run.id] = run
        return list(runs.values())

    def expected(self) -> list[dict[str, Any]]:
        """The checks of ``expected.json``; none if there is no such file."""
        path = self.path / "expected.json"
        if not path.is_file():
            return []
        try:
            return json.loads(path.read_text())["checks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}: expected {{"checks": [...]}}: {error!r}') from None


def _pairs(rows: Iterable[Any]) -> Iterable[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"sweep() yields {{binding: value}} dicts, not {row!r}")
        yield dict(row)


@functools.cache
def _load(path: Path) -> ModuleType:
    """A file as a module, once a process: it may register entry points."""
    name = f"flora_experiment_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
