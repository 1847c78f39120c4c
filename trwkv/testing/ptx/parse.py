"""Reads PTX, the assembly of NVIDIA's virtual machine: as much of it as Triton writes for the kernels here."""

import re
import struct
from dataclasses import dataclass, field
from typing import Any

_STATEMENT = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>[%\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)
_LOCATION = re.compile(r"\.loc\s.*?//\s*(\S+?):\d+(?:\s|$)")


@dataclass(frozen=True)
class Vector:
    """Registers in braces."""

    parts: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    """What stands in brackets: a register or the name of a parameter, and an offset in bytes."""

    base: str
    offset: int


@dataclass(frozen=True)
class Immediate:
    """A number; `bits` as an integer of the width it is written with, so far as it is written with one."""

    bits: int


Operand = str | Vector | Address | Immediate  # str: a register, a special one, or a label


@dataclass
class Instruction:
    """One instruction, `@guard opcode operands`, and the line of the kernel that it comes from."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    is_negated: bool
    where: str
    operation: Any = None  # what the machine makes of it when it first runs it

    def __str__(self) -> str:
        return f"{'.'.join(self.opcode)} ({self.where})"


@dataclass
class Program:
    """A kernel: its parameters' names, its instructions, and where labels point."""

    name: str
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """The one kernel of a module."""
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("ptx: expected a kernel (.visible .entry); found none")
    program = Program(entry[1], re.findall(r"\w+(?=,|\s*$)", re.sub(r"\s+", " ", entry[2])))
    where = "?"
    for line in _body(entry[3]):
        if location := _LOCATION.search(line):
            where = location[1]
        code = line.split("//")[0].strip()
        if code.startswith("$") and code.endswith(":"):
            program.labels[code[:-1]] = len(program.instructions)
            continue
        if code.startswith("{ .reg"):  # a scratch register of one statement
            code = code.strip("{}").strip() if code.count("{") == 1 else code[1:-1].strip()
        for statement in code.split(";"):
            if statement.strip() and not statement.strip().startswith("."):
                program.instructions.append(_instruction(statement.strip(), where))
    return program


def _body(text: str) -> list[str]:
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("{"))
    end = next(i for i, line in enumerate(lines) if line.startswith("}"))
    return lines[begin + 1 : end]


def _instruction(text: str, where: str) -> Instruction:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"ptx: cannot read {text!r} ({where})")
    operands = tuple(_operand(x) for x in _divided(match["operands"]))
    return Instruction(
        tuple(match["opcode"].split(".")), operands, match["guard"], bool(match["negated"]), where
    )


def _divided(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    return [x.strip() for x in re.split(r",(?![^{]*\})(?![^\[]*\])", text) if x.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(x.strip()) for x in text[1:-1].split(",")))
    if text.startswith("["):
        base, _, offset = text[1:-1].strip().replace("+ -", "+-").partition("+")
        return Address(base.strip(), int(offset or 0))
    if text.startswith(("0f", "0d")):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d+", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0])
    return text
