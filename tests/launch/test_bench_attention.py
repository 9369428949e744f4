"""``flora bench attention``: its table, its crossover, what it refuses."""

import json

import pytest

from flora_jax.cli import main
from flora_jax.launch.bench_attention import crossover


def test_a_row_for_each_variant_and_length(capsys):
    words = "bench attention --variants Hedgehog,LoLCATs --lengths 32,16 --rounds 1 --forward"
    small = "--heads 2 --kv_heads 1 --dim 4 --json"
    assert main([*words.split(), *small.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == [16, 32]
    assert set(found["variants"]) == {"Softmax", "Hedgehog", "LoLCATs"}
    softmax, hedgehog = found["variants"]["Softmax"], found["variants"]["Hedgehog"]
    assert softmax["state_bytes"] == [2 * 4 * 4 * n for n in (16, 32)]
    # Two heads' sums over eight features of values of four numbers.
    assert hedgehog["state_bytes"] == [4 * 2 * (8 * 4 + 8)] * 2
    assert all(s > 0 for f in found["variants"].values() for s in f["seconds"])


def test_the_crossing_lies_between_lengths_by_the_logarithm():
    assert crossover([64, 128, 256], [1, 2, 4], [4, 4, 4]) is None
    assert crossover([64, 128, 256], [1, 2, 4], [2, 2, 2]) == 128
    assert crossover([64, 128], [1, 4], [2, 2]) == pytest.approx(90.5, abs=0.1)
    assert crossover([64, 128], [3, 4], [2, 2]) == 64


def test_refusals(capsys):
    assert main(["bench", "attention", "--variants", "Hedghog"]) != 0
    assert "nearest: Hedgehog" in capsys.readouterr().err
    assert main(["bench", "attention", "--lengths", "many"]) != 0
    assert "no list of numbers" in capsys.readouterr().err
