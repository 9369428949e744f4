"""Gin's silent mistakes are errors here; each message names the place, the value, the choices."""

import dataclasses

import pytest

from flora_jax import config
from flora_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Low:
    """Stands for an adapter."""

    rank: int = 8
    alpha: float = 16.0
    init: str | None = None
    ranks: tuple[int, ...] = (4, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    size: int = 2
    inner: Low | None = None


def fit(*, rules: dict[str, object], steps: int, out: str | None = None, seed: int = 0):
    return rules, steps, out, seed


def other(*, words: int = 3):
    return words


config.register(Low)
config.register(Tensor)
config.entry_point(fit)
config.entry_point(other)

BASE = """
# a template
adapter = @Low()
fit.rules = {'.*/kernel': %adapter}
fit.steps = 10
Low.rank = 4
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.gin"
    path.write_text(BASE)
    return path


def message(*args, entry="fit", **kwargs):
    with pytest.raises(ConfigError) as caught:
        config.load(*args, **kwargs).arguments(entry)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_builds_the_graph_and_leaves_the_class_alone(base):
    arguments = config.load([base]).arguments("fit")
    assert arguments == {"rules": {".*/kernel": Low(rank=4)}, "steps": 10}
    assert type(arguments["rules"][".*/kernel"]) is Low
    assert Low() == Low(rank=8)


def test_later_bindings_win_and_values_convert(base):
    cfg = config.load([base], ["fit.steps=3", "Low.rank=2", "Low.alpha=1", "Low.ranks=[8, 8]"])
    low = cfg.arguments("fit")["rules"][".*/kernel"]
    assert low == Low(rank=2, alpha=1.0, ranks=(8, 8)) and isinstance(low.alpha, float)


@pytest.mark.parametrize("value", ["runs/x", "a-b.c", "svd", "~/runs/2026-01", "*.txt"])
def test_unquoted_words_and_paths_are_strings(base, value):
    assert config.load([base], [f"fit.out={value}"]).arguments("fit")["out"] == value
    assert config.load([base], [f"fit.out='{value}'"]).arguments("fit")["out"] == value


def test_a_macro_replaces_the_method_and_strands_nothing(base):
    cfg = config.load([base], ["adapter=@Tensor()", "Tensor.size=5"])
    assert cfg.arguments("fit")["rules"] == {".*/kernel": Tensor(size=5)}


def test_scoped_references(base):
    cfg = config.load([base], ["fit.rules={'a': @x/Low(), 'b': @Low()}", "x/Low.alpha=2.0"])
    rules = cfg.arguments("fit")["rules"]
    assert rules == {"a": Low(rank=4, alpha=2.0), "b": Low(rank=4)}


def test_includes_are_found_beside_the_file_and_written_out(tmp_path, base):
    top = tmp_path / "deep" / "top.gin"
    top.parent.mkdir()
    (top.parent / "extra.gin").write_text("fit.seed = 7\n")
    top.write_text("fit.seed = 1\ninclude 'extra.gin'\ninclude 'base.gin'\nfit.steps = 99\n")
    cfg = config.load([top], search_paths=[tmp_path])
    want = cfg.arguments("fit")
    assert want["steps"] == 99 and want["seed"] == 7
    flat = tmp_path / "flat.gin"
    flat.write_text(cfg.text)
    again = config.load([flat])
    assert again.arguments("fit") == want and again.hash() == cfg.hash()


def test_hash_ignores_order_comments_and_excluded_bindings(tmp_path, base):
    first = config.load([base]).hash()
    shuffled = tmp_path / "shuffled.gin"
    lines = [line for line in BASE.splitlines() if line and not line.startswith("#")]
    shuffled.write_text("\n".join(reversed(lines)))
    assert config.load([shuffled]).hash() == first
    assert config.load([base], ["fit.steps=11"]).hash() != first
    moved = config.load([base], ["fit.out=elsewhere"])
    assert moved.hash() != first and moved.hash(exclude=["fit.out"]) == first


def test_operative_config_shows_defaults(base):
    cfg = config.load([base])
    cfg.arguments("fit")
    assert "fit.seed = 0" in cfg.operative() and "Low.alpha = 16.0" in cfg.operative()


def test_wrong_type_names_binding_value_and_type(base):
    assert message([base], ["Low.rank='eight'"]) == "Low.rank = 'eight': expected int, got str"
    assert "Low.rank = True: expected int, got bool" in message([base], ["Low.rank=True"])
    assert "Python spells it None" in message([base], ["Tensor.inner=none", "adapter=@Tensor()"])
    text = message([base], ["Tensor.inner=Low", "adapter=@Tensor()"])
    assert "expected Low or None" in text and "@Low()" in text


def test_wrong_type_in_a_file_names_file_and_line(base):
    base.write_text(BASE + "Low.ranks = (1, 'x')\n")
    text = message([base])
    assert text == f"{base}:7: Low.ranks = (1, 'x'): expected tuple[int, ...], got tuple with 'x'"


def test_unknown_names_list_the_nearest(base):
    assert "unknown name '@Lov'; nearest: @Low" in message([base], ["adapter=@Lov()"])
    assert "unknown parameter of Low 'rnak'; nearest: rank" in message([base], ["Low.rnak=2"])
    assert "unknown name 'Loww'; nearest: Low" in message([base], ["Loww.rank=2"])
    base.write_text(BASE + "fit.step = 3\n")
    assert message([base]).startswith(f"{base}:7: unknown parameter of fit 'step'; nearest: steps")


def test_macros(base):
    text = message([base], ["adaptor=@Low()"])
    assert text == "--gin.adaptor=@Low(): unknown macro 'adaptor'; nearest: adapter"
    assert "unknown macro '%adaptr'; nearest: %adapter" in message(
        [base], ["fit.rules={'x': %adaptr}"]
    )


def test_unused_bindings(base):
    text = message([base], ["Tensor.size=3"])
    assert text == "--gin.Tensor.size=3: nothing uses Tensor.size; used are Low, fit"
    assert "nothing uses Low.rank" in message([base], ["adapter=@Tensor()", "Low.rank=3"])
    base.write_text(BASE + "other.words = 4\n")  # another command's
    config.load([base]).arguments("fit")
    base.write_text(BASE + "unused_macro = 4\n")
    assert "nothing uses unused_macro" in message([base])


def test_a_reference_is_called_in_files_and_may_be_short_in_a_shell(base):
    assert config.load([base], ["adapter=@Tensor"]).arguments("fit")["rules"][".*/kernel"].size == 2
    base.write_text(BASE + "adapter = @Low\n")
    assert message([base]).endswith(":7: @Low is not called: write @Low()")


def test_required_argument(base):
    base.write_text("fit.rules = {}\n")
    assert message([base]) == "fit.steps is required: add --gin.fit.steps=VALUE"


@pytest.mark.parametrize("text", ["fit.steps = ", "fit.steps = (1,", "fit.steps 3", "%%"])
def test_syntax_errors_name_the_file(base, text):
    base.write_text("fit.rules = {}\n" + text + "\n")
    assert message([base]).startswith(f"{base}")


def test_files(base, tmp_path):
    assert "unknown gin file 'nope.gin'" in message(["nope.gin"])
    base.write_text("include 'base.gin'\n")
    assert "base.gin includes itself" in message([base])
    base.write_text("import os\n")
    assert "imports nothing" in message([base])


def test_a_name_is_registered_once():
    config.register(Low)

    @dataclasses.dataclass(frozen=True)
    class Impostor:
        x: int = 0

    with pytest.raises(ConfigError, match="two things are registered as 'Low'"):
        config.register(Impostor, name="Low")
