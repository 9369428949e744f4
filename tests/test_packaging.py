"""The installed layout, the direction of imports and the names that must not collide."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import those of its own level and below (DESIGN: dependencies point one way).
LEVELS = [
    {"core"},
    {"quant", "kernels"},
    {"adapters", "attention", "merging"},
    {"engine"},
    {"models", "linen", "nnx", "io"},
    {"data", "training", "evaluation", "analysis"},
    {"launch", "config", "cli"},
    {"experiments"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
CORE_MAY = {"jax", "numpy", "einops", "flora_jax"}


def modules():
    for path in sorted((ROOT / "flora_jax").rglob("*.py")):
        parts = path.relative_to(ROOT / "flora_jax").with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            yield parts[0], path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_dependencies_point_one_way():
    wrong = []
    for package, path in modules():
        for name in imports(path):
            parts = name.split(".")
            ours = parts[0] == "flora_jax" and len(parts) > 1 and parts[1] in LEVEL
            if ours and LEVEL[parts[1]] > LEVEL[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_core_knows_no_flax_and_no_gin():
    allowed = CORE_MAY | set(sys.stdlib_module_names)
    pure = ("core", "quant", "adapters", "attention", "merging", "engine", "kernels")
    for package, path in modules():
        if package in pure:
            foreign = {name.split(".")[0] for name in imports(path)} - allowed
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_no_private_jax():
    for _, path in modules():
        for name in imports(path):
            assert not name.startswith(("jax._src", "jax.core", "jaxlib")), f"{path} {name}"


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "flora_jax").rglob("__init__.py")
    }
    kernels = {
        ".".join(("flora_jax", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "kernels").rglob("__init__.py")
    }
    mapped = {"flora_jax.configs", "flora_jax.experiments"}
    assert listed == found | kernels | mapped


def test_files_stay_under_400_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("flora_jax", "kernels", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs
    ).stdout


@pytest.mark.interop
def test_our_kernels_folder_is_not_taken_for_the_package_of_that_name():
    """transformers looks for a package ``kernels``; the repository root is on sys.path here."""
    code = (
        "import transformers; from transformers import LlamaConfig, LlamaForCausalLM;"
        "c = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        "num_attention_heads=2); LlamaForCausalLM(c); print('ok')"
    )
    assert run(code, cwd=ROOT).strip() == "ok"


def test_import_is_light():
    """Importing flora_jax pulls in no torch, transformers, matplotlib or pyarrow."""
    code = (
        "import sys, flora_jax; heavy = {'torch', 'transformers', 'matplotlib', 'pyarrow',"
        "'sklearn', 'grain', 'orbax', 'gin'} & set(sys.modules); print(sorted(heavy))"
    )
    assert run(code).strip() == "[]"


def test_gin_files_and_experiments_are_importable_resources():
    code = (
        "from importlib.resources import files;"
        "print(len(list((files('flora_jax.configs') / 'runs').iterdir())) > 0)"
    )
    assert run(code, cwd="/").strip() == "True"
