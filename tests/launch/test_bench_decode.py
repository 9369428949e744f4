"""``flora bench decode``: its figures and what it refuses."""

import json

from flora_jax.cli import main

SMALL = "--layers 1 --vocab 16 --tokens 2 --rounds 1 --json"


def test_softmax_states_grow_and_the_others_do_not(capsys):
    words = f"bench decode --variants Liger --contexts 128,96 {SMALL}"
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["contexts"] == [96, 128]
    softmax, liger = found["variants"]["Softmax"], found["variants"]["Liger"]
    # Keys and values of three heads of 64 in float32.
    assert softmax["state_bytes"] == [2 * 3 * 64 * 4 * n for n in (96, 128)]
    # A ring of 64 of them, and three sums of 64 x 64.
    assert liger["state_bytes"] == [2 * 3 * 64 * 4 * 64 + 3 * 64 * 64 * 4] * 2
    assert min(softmax["tokens_per_s"] + liger["tokens_per_s"]) > 0


def test_refusals(capsys):
    for words, reason in [
        ("--variants Ligor", "nearest: Liger"),
        ("--variants InLine", "InLine has no state to generate with"),
        ("--contexts many", "no list of numbers"),
        ("--contexts 8 --tokens 9", "must be at least --tokens 9"),
    ]:
        assert main(["bench", "decode", *SMALL.split(), *words.split()]) != 0
        assert reason in capsys.readouterr().err
