"""``flora bench kernels``: every op's cases compile here, the small ones are timed."""

import json

import pytest

from flora_jax import cli
from flora_jax.kernels import bench_spec, costs
from flora_jax.launch import bench_kernels

ONE = ["--ops", "low_bit_matmul", "--cases", "w4a16 g64 M1 .*"]


def bench(capsys, *words):
    status = cli.main(["bench", "kernels", *words])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_compiled_cost_of_this_machine(capsys):
    status, out, _ = bench(capsys, *ONE, "--targets", "here", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["pass"] for row in rows] == ["forward", "gradient"]
    case = {case.name: case for case in bench_spec.cases("low_bit_matmul")}[rows[0]["case"]]
    assert rows[0]["least_mbytes"] == case.work.bytes / 1e6
    assert rows[0]["gflops"] >= 0.9 * case.work.flops / 1e9
    assert 0 < rows[0]["share"] < 1 and rows[0]["bound_us"] > 0


def test_medians_of_the_op_and_its_rival(capsys):
    status, out, _ = bench(capsys, *ONE, "--measure", "--rounds", "1")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2 + 4 and lines[0].startswith("| op | case | pass |")
    assert [line.split(" | ")[4] for line in lines[2:]] == ["dispatched", "bfloat16"] * 2


def test_a_program_that_was_not_counted_whole_has_no_share():
    work = costs.Work(flops=1e9, bytes=1e9)
    got = bench_kernels.cost(lambda x: x + 1, (1.0,), work, "here", "h200")
    assert got["share"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ops", "low_bit_matmull"], "'low_bit_matmull'; nearest: low_bit_matmul"),
        (["--cases", "w4a16 g128 M3 K4096 N14336"], "nearest: w4a16 g128 M"),
        (["--cases", "("], "--cases '('"),
        (["--targets", "v5e"], "'v5e'; nearest: tpu_v5e"),
        (["--device", "h20"], "'h20'; nearest: h200"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--measure", "--ops", "low_bit_matmul", "--cases", ".*N14336"], "none of the cases is"),
    ],
)
def test_bad_words_are_one_line(capsys, words, message):
    status, _, err = bench(capsys, *words)
    assert status == 1 and message in err and err.count("\n") == 1
