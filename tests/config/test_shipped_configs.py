"""Every gin file in the tree parses, finalizes and has a header; every run is complete."""

import re
from pathlib import Path

import pytest

from flora_jax import config
from flora_jax.core.registry import methods
from flora_jax.launch import catalogue
from flora_jax.launch.experiment import Experiment

ROOT = Path(__file__).parents[2]
FILES = sorted(p for name in ("configs", "experiments") for p in (ROOT / name).rglob("*.gin"))
RUNS = sorted((ROOT / "configs" / "runs").glob("*.gin"))
OPTIMIZERS = sorted((ROOT / "configs" / "optimizers").glob("*.gin"))
ATTENTION = sorted((ROOT / "configs" / "attention").glob("*.gin"))
SWEEPS = sorted(p.parent for p in (ROOT / "experiments").glob("*/sweep.py"))


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_parses_with_finalize_after_a_run_template(path):
    catalogue.register_all()
    if path.parent.parent.name == "experiments":
        Experiment.find(path.parent).module("sweep")
    folder = path.parent.name
    part_of_a_run = folder in ("models", "data", "attention")  # they use its macros
    template = [ROOT / "configs/runs/finetune_lm.gin"] if part_of_a_run else []
    config.load([*template, path], search_paths=[path.parent])
    assert path.read_text().startswith("# "), (
        "a gin file starts with a comment that says what it is"
    )


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_builds_and_uses_every_binding(path):
    catalogue.register_all()
    arguments = config.load([path]).arguments("train")
    assert arguments["steps"] > 0 and arguments["rules"]
    header = path.read_text()
    assert f"flora train --gin_file=runs/{path.name}" in header and "Expected" in header


@pytest.mark.parametrize("method", [m.name for m in methods("adapter")])
def test_a_configuration_per_method(method):
    catalogue.register_all()
    files = sorted((ROOT / "configs" / "adapters").glob("*.gin"))
    with_it = [p for p in files if f"adapter = @{method}()" in p.read_text()]
    assert with_it, f"configs/adapters has no file for {method}"
    for path in with_it:
        loaded = config.load([ROOT / "configs/runs/finetune_lm.gin", path])
        found = {type(a).__name__ for a in loaded.arguments("train")["rules"].values()}
        # A method may train the norms beside it.
        assert method in found and found <= {method, "Replace"}


@pytest.mark.parametrize("path", OPTIMIZERS, ids=name)
def test_an_optimizer_over_its_run_uses_every_binding(path):
    """The header's command: ``--gin_file=RUN --gin_file=optimizers/NAME.gin``."""
    catalogue.register_all()
    command = rf"--gin_file=(runs/\w+.gin) --gin_file=optimizers/{path.name}"
    (run,) = re.findall(command, path.read_text())
    optimizer = config.load([ROOT / "configs" / run, path]).arguments("train")["optimizer"]
    used = [o for _, o in getattr(optimizer, "rules", [("", optimizer)])]
    assert path.stem in {type(o).__name__.lower() for o in used}


@pytest.mark.parametrize("path", ATTENTION, ids=name)
def test_an_attention_over_its_run_uses_every_binding(path):
    """The header's commands: ``--gin_file=RUN --gin_file=attention/NAME.gin``."""
    catalogue.register_all()
    command = rf"--gin_file=(runs/\w+.gin) --gin_file=attention/{path.name}"
    run, *_ = re.findall(command, path.read_text())
    model = config.load([ROOT / "configs" / run, path]).arguments("train")["model"]
    assert type(model.config.attention).__name__.lower().startswith(path.stem.split("_")[0])


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda p: p.name)
def test_every_run_of_every_sweep_parses(folder):
    catalogue.register_all()
    experiment = Experiment.find(folder)
    assert experiment.runs()
    assert (folder / "README.md").is_file()
    experiment.expected()
