"""The README's example runs as printed; every name it promises exists."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.real
def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "trained numbers" in capsys.readouterr().out
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(names["params"])
    cores = [arrays["core"] for arrays in names["grads"].values()]
    assert all(np.abs(g).max() > 0 for g in cores)


def test_the_table_names_every_method():
    for method in flora.methods("adapter"):
        assert re.search(rf"\b{method.name}\b", README), method.name


def test_the_commands_exist():
    assert set(re.findall(r"^flora (\w+)", README, re.M)) <= set(cli.COMMANDS)
