"""Runs PTX on the CPU: all lanes of all programs of a grid at once, each register an array with one entry per lane."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trwkv.testing.ptx.arithmetic import (
    BINARY,
    WIDTHS,
    Bits,
    bit_field,
    compare,
    convert,
    dtype,
    exp2_approximate,
    extreme,
    extreme_of_pairs,
    fma,
    packed,
    permuted,
    reciprocal_approximate,
    wide,
)
from trwkv.testing.ptx.memory import Memory, MemoryFault
from trwkv.testing.ptx.parse import Address, Immediate, Instruction, Operand, Program, Vector

WARP = 32


class Machine:
    """One launch. Lanes that diverge run one after the other and meet again where their paths do."""

    def __init__(
        self, program: Program, grid: int, threads: int, memory: Memory, parameters: Sequence[int]
    ) -> None:
        self.program = program
        self.memory = memory
        self.n = grid * threads
        self.lanes = np.arange(self.n)
        self.threads = threads
        self.parameters = dict(zip(program.parameters, parameters, strict=True))
        self.registers: dict[str, Bits] = {
            "%tid.x": (self.lanes % threads).astype(np.uint32),
            "%ctaid.x": (self.lanes // threads).astype(np.uint32),
            "%ntid.x": np.full(self.n, threads, np.uint32),
            "%nctaid.x": np.full(self.n, grid, np.uint32),
        }
        self.active = np.ones(self.n, bool)
        self.executed = 0

    def run(self) -> None:
        end = len(self.program.instructions)
        at = np.zeros(self.n, np.int64)  # of every lane: the next instruction
        with np.errstate(all="ignore"):
            while (now := int(at.min())) < end:
                self.active = at == now
                others = at[~self.active]
                stop = int(others.min()) if len(others) else end
                at[self.active] = self._straight_on(now, stop)

    def _straight_on(self, now: int, stop: int) -> Bits | int:
        """Runs the active lanes from one instruction to the next branch, or until others wait: where they go on."""
        while now < stop:
            instruction = self.program.instructions[now]
            name = instruction.opcode[0]
            if name in ("bra", "ret"):
                target = len(self.program.instructions)
                if name == "bra":
                    target = self.program.labels[str(instruction.operands[-1])]
                taken = self._mask(instruction)[self.active]
                return np.where(taken, target, now + 1)
            try:
                self._execute(instruction)
            except MemoryFault as fault:
                raise MemoryFault(f"{self.program.name}, {instruction}: {fault}") from None
            self.executed += int(self.active.sum())
            now += 1
        return now

    def _mask(self, instruction: Instruction) -> Bits:
        if instruction.guard is None:
            return self.active
        guard = self.registers[instruction.guard]
        return self.active & (~guard if instruction.is_negated else guard)

    def _execute(self, instruction: Instruction) -> None:
        execute = _SPECIAL.get(instruction.opcode[0])
        if execute is not None:
            execute(self, instruction)
            return
        operation, kinds, target = _operation(instruction)
        sources = [self.value(x, k) for x, k in zip(instruction.operands[1:], kinds, strict=True)]
        self.write(instruction, instruction.operands[0], operation(*sources), target)

    def value(self, operand: Operand, kind: str) -> Bits:
        """An operand as this PTX type; of a number one entry for all lanes."""
        target = dtype(kind)
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array([operand.bits != 0])
            return np.array([operand.bits & (1 << WIDTHS[kind]) - 1], f"u{WIDTHS[kind] // 8}").view(target)
        bits = self.registers[str(operand)]
        if bits.itemsize > target.itemsize:  # of a wider register the lower bits
            bits = bits.astype(f"u{target.itemsize}")
        return bits.view(target)

    def write(self, instruction: Instruction, operand: Operand, value: Bits, kind: str) -> None:
        """To a register, in the lanes that execute the instruction."""
        bits = value if kind == "pred" else value.view(f"u{value.dtype.itemsize}")
        bits = np.broadcast_to(bits, self.n)
        mask = self._mask(instruction)
        name = str(operand)
        if not mask.all():
            old = self.registers.get(name)
            bits = np.where(mask, bits, np.zeros((), bits.dtype) if old is None else old)
        self.registers[name] = bits

    def whole(self, per: int, what: Instruction) -> None:
        """What takes all lanes of a warp or of a program must find them together."""
        together = self.active.reshape(-1, per)
        if (together.any(1) != together.all(1)).any():
            raise MemoryFault(f"{self.program.name}, {what}: lanes that must all take part are elsewhere")


def _operation(instruction: Instruction) -> tuple[Callable[..., Bits], list[str], str]:
    """What an instruction computes, the types of what it takes and of what it gives."""
    name, *modifiers = instruction.opcode
    kind = modifiers[-1]
    if name == "cvt" and len(instruction.operands) == 3:
        return (lambda a, b: packed(a, b, kind=modifiers[-2])), ["f32", "f32"], "b32"
    if name == "cvt":
        to, source = modifiers[-2:]
        return convert(to, source, tuple(modifiers)), [source], to
    if name == "setp":
        return compare(modifiers[0]), [kind, kind], "pred"
    if name == "selp":
        return (lambda a, b, p: np.where(p, a, b)), [kind, kind, "pred"], kind
    if name in ("max", "min") and kind.endswith("x2"):
        return (lambda a, b: extreme_of_pairs(a, b, larger=name == "max", kind=kind)), [kind, kind], kind
    if name in ("max", "min") and "NaN" in modifiers:
        return (lambda a, b: extreme(a, b, larger=name == "max", nan=True)), [kind, kind], kind
    if name in ("mul", "mad") and modifiers[0] == "wide":
        result = f"{kind[0]}64"
        if name == "mul":
            return (lambda a, b: wide(lambda x: x, a, b)), [kind, kind], result
        return (lambda a, b, c: wide(np.add, a, b, c)), [kind, kind, result], result
    simple: dict[str, tuple[Callable[..., Bits], int]] = {
        "mul": (np.multiply, 2), "mad": (lambda a, b, c: a * b + c, 3), "fma": (fma, 3),
        "neg": (np.negative, 1), "abs": (np.abs, 1), "not": (np.invert, 1),
        "ex2": (exp2_approximate, 1), "rcp": (reciprocal_approximate, 1),
        "prmt": (permuted, 3),
    }  # fmt: skip
    if name in ("shl", "shr"):
        return BINARY[name], [kind, "u32"], kind
    if name == "bfe":
        return bit_field, [kind, "u32", "u32"], kind
    if name in BINARY:
        return BINARY[name], [kind, kind], kind
    if name in simple:
        operation, count = simple[name]
        return operation, [kind] * count, kind
    raise NotImplementedError(f"ptx: no way to run {instruction}")


def _move(machine: Machine, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind = instruction.opcode[1]
    if isinstance(to, Vector):
        part = f"u{WIDTHS[kind] // 8 // len(to.parts)}"
        columns = np.broadcast_to(machine.value(source, kind), machine.n).copy().view(part).reshape(machine.n, -1)
        for operand, column in zip(to.parts, columns.T, strict=True):
            machine.write(instruction, operand, np.ascontiguousarray(column), "b")
    elif isinstance(source, Vector):
        part_kind = f"b{WIDTHS[kind] // len(source.parts)}"
        columns = np.stack([np.broadcast_to(machine.value(x, part_kind), machine.n) for x in source.parts], 1)
        machine.write(instruction, to, np.ascontiguousarray(columns).view(f"u{WIDTHS[kind] // 8}")[:, 0], kind)
    else:
        machine.write(instruction, to, machine.value(source, kind), kind)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _addresses(machine: Machine, instruction: Instruction, at: Operand, mask: NDArray, total: int) -> Bits:
    if not isinstance(at, Address):
        raise NotImplementedError(f"ptx: no way to run {instruction}")
    base = machine.registers[at.base][mask] + np.uint64(at.offset & (1 << 64) - 1)
    if (base % np.uint64(total)).any():
        raise MemoryFault(f"an address is no multiple of {total}, the width of the access")
    return base


def _load(machine: Machine, instruction: Instruction) -> None:
    to, at = instruction.operands
    _, space, *_, kind = instruction.opcode
    width = WIDTHS[kind] // 8
    if space == "param" and isinstance(at, Address):
        number = np.array([machine.parameters[at.base] & (1 << 64) - 1], np.uint64)
        size = 8 if str(to).startswith("%rd") else 4
        if kind == "s32" and size == 8:
            number = number.astype(np.uint32).view(np.int32).astype(np.int64)
        machine.write(instruction, to, number.astype(f"u{size}"), kind)
        return
    mask = machine._mask(instruction)
    if space != "global":
        raise NotImplementedError(f"ptx: no way to run {instruction}")
    if not mask.any():
        return
    parts = _parts(to)
    addresses = _addresses(machine, instruction, at, mask, width * len(parts))
    for i, part in enumerate(parts):
        words = np.zeros(machine.n, f"u{width}")
        words[mask] = machine.memory.load(machine.lanes[mask], addresses + np.uint64(i * width), width)
        machine.write(instruction, part, words, kind)


def _store(machine: Machine, instruction: Instruction) -> None:
    at, what = instruction.operands
    _, space, *_, kind = instruction.opcode
    if space != "global":
        raise NotImplementedError(f"ptx: no way to run {instruction}")
    mask = machine._mask(instruction)
    if not mask.any():
        return
    width = WIDTHS[kind] // 8
    parts = _parts(what)
    addresses = _addresses(machine, instruction, at, mask, width * len(parts))
    for i, part in enumerate(parts):
        words = np.broadcast_to(machine.value(part, f"b{8 * width}"), machine.n)
        machine.memory.store(machine.lanes[mask], addresses + np.uint64(i * width), words[mask])


def _barrier(machine: Machine, instruction: Instruction) -> None:
    machine.whole(machine.threads, instruction)
    machine.memory.barriers[np.unique(machine.lanes[machine.active] // machine.threads)] += 1


def _reduce(machine: Machine, instruction: Instruction) -> None:
    """redux.sync of whole warps."""
    machine.whole(WARP, instruction)
    to, source, _ = instruction.operands
    _, _, name, kind = instruction.opcode
    rows = np.broadcast_to(machine.value(source, kind), machine.n).reshape(-1, WARP)
    reduced = {"min": np.min, "max": np.max, "add": np.sum}[name](rows, axis=1)
    machine.write(instruction, to, np.repeat(reduced.astype(rows.dtype), WARP), kind)


def _shuffle(machine: Machine, instruction: Instruction) -> None:
    """shfl.sync.bfly of whole warps."""
    machine.whole(WARP, instruction)
    to, source, lane_mask, _, _ = instruction.operands
    if instruction.opcode[2] != "bfly" or "|" in str(to):
        raise NotImplementedError(f"ptx: no way to run {instruction}")
    rows = np.broadcast_to(machine.value(source, "b32"), machine.n).reshape(-1, WARP)
    partner = np.arange(WARP) ^ int(machine.value(lane_mask, "u32")[0])
    machine.write(instruction, to, rows[:, partner].reshape(-1), "b32")


_SPECIAL: dict[str, Callable[[Machine, Instruction], None]] = {
    "mov": _move, "ld": _load, "st": _store, "bar": _barrier, "redux": _reduce, "shfl": _shuffle,
}  # fmt: skip
