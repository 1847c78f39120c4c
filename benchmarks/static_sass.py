"""Reads machine code: the loops over tiles, and what an iteration that stays on the fast path executes."""

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trwkv.ops._compile import _tool

_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
# Bytes that a lane moves, by modifier; without one of these 4.
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_TARGET = re.compile(r"\((\.L_\w+)\)")


@dataclass
class FastPath:
    """Instructions of one iteration, by opcode with its modifiers, and their number."""

    opcodes: dict[str, int]
    instructions: int
    trace: tuple[tuple[str, int], ...] = ()
    """In their order, each with the upper half of its encoding, which says what it waits for."""

    def count(self, *names: str) -> int:
        """How many begin with one of these names."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in names)

    def narrowest(self, name: str) -> int | None:
        """Bytes that one lane moves by the narrowest of the loads or stores with this name; None: there is none."""
        widths = [
            next((_WIDTHS[x] for x in opcode.split(".") if x in _WIDTHS), 4)
            for opcode in self.opcodes
            if opcode.split(".")[0] == name
        ]
        return min(widths, default=None)

    def __add__(self, other: "FastPath") -> "FastPath":
        opcodes = Counter(self.opcodes) + Counter(other.opcodes)
        return FastPath(dict(opcodes), self.instructions + other.instructions, self.trace + other.trace)


def machine_code(compiled: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        return _tool("nvdisasm", "-c", "-hex", str(binary))


def fast_paths(code: str, *, exponentials: int) -> list[FastPath]:
    """One for every loop that itself, not in a loop within, computes that many exponentials or more."""
    program: list[tuple[str, str, bool]] = []  # opcode, target label, whether it is predicated
    labels: dict[str, int] = {}
    controls: list[int] = []
    for line in code.splitlines():
        if line.startswith(".L_"):
            labels[line.split(":")[0]] = len(program)
        elif match := _INSTRUCTION.match(line):
            target = _TARGET.search(match[3]) if match[2].startswith("BRA") else None
            is_conditional = bool(match[1]) or bool(re.search(r"BRA\s+!?U?P\d", match[2] + match[3]))
            program.append((match[2], target[1] if target else "", is_conditional))
            controls.append(0)
        elif controls and (encoding := _CONTROL.match(line)):
            controls[-1] = int(encoding[1], 16)
    loops = [
        (labels[target], at)
        for at, (opcode, target, _) in enumerate(program)
        if opcode.startswith("BRA") and labels.get(target, at) < at
    ]
    paths = []
    for begin, end in loops:
        inner = [loop for loop in loops if begin <= loop[0] and loop[1] <= end and loop != (begin, end)]
        steps = _follow(program, labels, begin, end, inner)
        path = FastPath(
            dict(Counter(program[at][0] for at in steps)),
            len(steps),
            tuple((program[at][0], controls[at]) for at in steps),
        )
        if path.opcodes.get("MUFU.EX2", 0) >= exponentials:
            paths.append(path)
    return paths


def _follow(
    program: list[tuple[str, str, bool]],
    labels: dict[str, int],
    begin: int,
    end: int,
    inner: list[tuple[int, int]],
) -> list[int]:
    """From the loop's first instruction to its branch back: of all ways around the loops within, the one that computes
    most exponentials, which are unrolled on the fast path alone; of those the shortest.
    """
    after: dict[int, int] = {}  # the next instruction
    value: dict[int, tuple[float, int]] = {
        end: (0.0, 0)
    }  # exponentials from here to the end; instructions, negative
    for at in range(end - 1, begin - 1, -1):
        opcode, target, is_conditional = program[at]
        goes_to = labels.get(target, -1) if opcode.startswith("BRA") else -1
        ways = [] if opcode.startswith("BRA") and not is_conditional else [at + 1]
        ways += [goes_to] if at < goes_to <= end else []
        best = max(ways, key=lambda way: value[way], default=end)
        is_within = any(a <= at <= b for a, b in inner)
        exponentials, negative_length = value[best]
        if is_within or not ways:
            exponentials = float("-inf")
        value[at] = (exponentials + (opcode == "MUFU.EX2"), negative_length - 1)
        after[at] = best
    steps = [begin]
    while steps[-1] != end:
        steps.append(after[steps[-1]])
    return steps
