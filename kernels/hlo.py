"""Bytes that a compiled program moves, read from its text.

For compilers that give an executable but no figures for it, as CUDA's without a device: XLA can
then count the program before fusion only, with every broadcast and every reshape as a copy.
"""

from __future__ import annotations

import re

BITS = {"pred": 8, "token": 0}
"""Of dtypes whose names have no number, or not theirs."""
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|body|condition|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
NOTHING = ("parameter", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id")
"""Instructions that name what is there."""
AROUND = ("while", "call", "conditional", "async-start")
"""Instructions that run others, and move nothing themselves."""


def size(shape: str) -> float:
    """Bytes of a shape as programs write it, of a tuple all its parts'.

    >>> size("(bf16[2,3]{1,0}, s32[])"), size("f8e4m3fn[8]{0}"), size("u4[6]{0}")
    (16.0, 8.0, 3.0)
    """
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * BITS.get(dtype, int((re.findall(r"\d+", dtype) or [32])[0]))
    return total / 8


def moved(program: str, but: str) -> float:
    """Bytes read and written by a compiled program's instructions; a loop's body counts once.

    An instruction reads its operands and writes its result, whole, also where it uses a part.

    Args:
      program: the text of the optimised module.
      but: custom calls whose target contains it count nothing.
    """
    parts: dict[str, list[tuple[str, ...]]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            lines = parts[start[2]] = []
            entry = start[2] if start[1] else entry
        elif found := _INSTRUCTION.match(line):
            lines.append(found.groups())

    def count(name: str) -> float:
        shapes = {result: size(shape) for result, shape, _, _ in parts[name]}
        total = 0.0
        for result, _, opcode, rest in parts[name]:
            if opcode in AROUND:
                called = ",".join(_CALLED.findall(rest)).split(",")
                total += sum(count(inner.strip(" {}%")) for inner in called)
            elif opcode in NOTHING or opcode.endswith("-done"):
                continue
            elif not (opcode == "custom-call" and re.search(rf'target="[^"]*{but}', rest)):
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                total += shapes[result] + sum(shapes.get(operand, 0.0) for operand in operands)
        return total

    return count(entry)
