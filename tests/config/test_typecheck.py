from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from flora_jax.core.errors import ConfigError
from flora_jax.launch.typecheck import conform, describe


@pytest.mark.parametrize(
    "value, hint, want",
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (3, float, 3.0),
        ("x", str | None, "x"),
        (None, str | None, None),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2.5], tuple[float, float], (1.0, 2.5)),
        ((), tuple[()], ()),
        ([3], tuple, (3,)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1]}, Mapping[str, tuple[int, ...]], {"a": (1,)}),
        ([1], Sequence[float], [1.0]),
        ("b", Literal["a", "b"], "b"),
        (len, Callable[[Any], int], len),
        ([[1, "x"]], list[tuple[int, str]], [(1, "x")]),
        (object, Any, object),
    ],
)
def test_accepts(value, hint, want):
    got = conform(value, hint, "f.x")
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    "value, hint",
    [
        ("3", int),
        (3.0, int),
        (True, float),
        ("abc", Sequence[str]),
        ((1, 2, 3), tuple[int, int]),
        ({"a": "b"}, dict[str, int]),
        ("c", Literal["a", "b"]),
        (1, Literal[True]),
        (3, Callable),
        (None, int),
        ([1, None], list[int]),
    ],
)
def test_refuses(value, hint):
    with pytest.raises(ConfigError, match=r"^f\.x = .*: expected .*, got "):
        conform(value, hint, "f.x")


def test_describe():
    assert describe(int | None) == "int or None"
    assert describe(Literal["a", 1]) == "one of 'a', 1"
    assert describe(Mapping[str, int]) == "Mapping[str, int]"
