"""docs/engine.md runs as printed, block after block."""

import re
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "docs" / "engine.md").read_text()


def test_every_block_runs(capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(code, "docs/engine.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "energy kept" in printed and "of the change" in printed
