import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from flora_jax.core.errors import RuleError, StructureError
from flora_jax.core.paths import Rules, canonical, flatten, unflatten

NAME = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,6}", fullmatch=True)
TREES = st.recursive(
    st.integers(), lambda kids: st.dictionaries(NAME, kids, min_size=1, max_size=3), max_leaves=12
).filter(lambda t: isinstance(t, dict))


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_unflatten_inverts_flatten(tree):
    assert unflatten(flatten(tree)) == tree


def test_unflatten_refuses_a_leaf_that_is_a_parent():
    with pytest.raises(StructureError, match="a/b"):
        unflatten({"a": 1, "a/b": 2})


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("layers_3/attn/kernel", "layers/attn/kernel"),
        ("encoder/layers/12/kernel", "encoder/layers/kernel"),
        ("h_0/x", "h/x"),
        ("blocks_1/layers_2/k", "blocks/layers/k"),
        ("Dense_0/kernel", "Dense_0/kernel"),
        ("my_layers_3/kernel", "my_layers_3/kernel"),
        ("layers/attn/kernel", "layers/attn/kernel"),
    ],
)
def test_canonical(path, short):
    assert canonical(path) == short
    assert canonical(short) == short


def test_first_match_wins_on_the_path_or_its_canonical_form():
    rules = Rules.of([("layers_1/.*", "one"), ("layers/.*", "any")])
    assert rules.match(["layers_0/k", "layers_1/k", "norm"]) == {
        "layers_0/k": "any",
        "layers_1/k": "one",
    }


def test_a_rule_that_matches_nothing_lists_the_nearest_paths():
    with pytest.raises(RuleError, match=r"'\.\*/q_prj/kernel' matches nothing.*attn/q_proj/kernel"):
        Rules.of({".*/q_prj/kernel": 1}).match(["attn/q_proj/kernel", "norm/scale"])


def test_a_rule_behind_another_is_an_error():
    with pytest.raises(RuleError, match="never reached"):
        Rules.of({".*": 1, "a": 2}).match(["a", "b"])


def test_a_broken_regex_is_an_error():
    with pytest.raises(RuleError, match=re.escape("'(' is not a regular expression")):
        Rules.of({"(": 1})
