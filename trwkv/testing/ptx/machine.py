"""Runs PTX on the CPU: all lanes of all programs of a grid at once, each register an array with one entry per lane."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trwkv.testing.ptx.arithmetic import WIDTHS, Bits, dtype
from trwkv.testing.ptx.dependence import loads_handed_over
from trwkv.testing.ptx.memory import WARP, Memory, MemoryFault
from trwkv.testing.ptx.operations import UnknownInstruction, operation_of
from trwkv.testing.ptx.parse import Address, Immediate, Instruction, Operand, Program, Vector


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
        self.loads: dict[int, int] = {}  # by instruction: the number that memory gave the last one
        self.now = 0
        self.active = np.ones(self.n, bool)
        self._is_together = True  # all lanes are active

    def run(self) -> None:
        end = len(self.program.instructions)
        at = np.zeros(self.n, np.int64)  # of every lane: the next instruction
        with np.errstate(all="ignore"):
            while (now := int(at.min())) < end:
                self.active = at == now
                self._is_together = bool(self.active.all())
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
                taken = self.mask(instruction)[self.active]
                return np.where(taken, target, now + 1)
            self.now = now
            try:
                self._execute(instruction)
            except MemoryFault as fault:
                raise MemoryFault(f"{self.program.name}, {instruction}: {fault}") from None
            now += 1
        return now

    def mask(self, instruction: Instruction) -> Bits:
        if instruction.guard is None:
            return self.active
        guard = self.registers[instruction.guard]
        return self.active & (~guard if instruction.is_negated else guard)

    def _execute(self, instruction: Instruction) -> None:
        execute = _SPECIAL.get(instruction.opcode[0])
        if execute is not None:
            execute(self, instruction)
            return
        if instruction.operation is None:
            instruction.operation = operation_of(instruction)
        operation, kinds, target = instruction.operation
        sources = [self.value(x, k) for x, k in zip(instruction.operands[1:], kinds, strict=True)]
        self.write(instruction, instruction.operands[0], operation(*sources), target)

    def value(self, operand: Operand, kind: str) -> Bits:
        """An operand as this PTX type; of a number one entry for all lanes."""
        target = dtype(kind)
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array([operand.bits != 0])
            return np.array([operand.bits & (1 << WIDTHS[kind]) - 1], f"u{WIDTHS[kind] // 8}").view(target)
        bits = self.registers.get(str(operand))
        if bits is None:
            return _undefined(target)
        if bits.itemsize > target.itemsize:  # of a wider register the lower bits
            bits = bits.astype(f"u{target.itemsize}")
        return bits.view(target)

    def write(self, instruction: Instruction, operand: Operand, value: Bits, kind: str) -> None:
        """To a register, in the lanes that execute the instruction."""
        bits = value if kind == "pred" else value.view(f"u{value.dtype.itemsize}")
        if bits.shape != self.lanes.shape:
            bits = np.broadcast_to(bits, self.n)
        mask = self.mask(instruction)
        name = str(operand)
        if not (mask is self.active and self._is_together):
            old = self.registers.get(name)
            bits = np.where(mask, bits, _undefined(bits.dtype) if old is None else old)
        self.registers[name] = bits

    def whole(self, per: int, what: Instruction) -> None:
        """What takes all lanes of a warp or of a program must find them together."""
        together = self.active.reshape(-1, per)
        if (together.any(1) != together.all(1)).any():
            raise MemoryFault(f"{self.program.name}, {what}: lanes that must all take part are elsewhere")


def _undefined(of: np.dtype) -> Bits:
    """A register that nothing was written to, such as what a masked load leaves out: all bits set, NaN if a float."""
    return np.array([True]) if of.kind == "b" else np.full(1, -1, f"i{of.itemsize}").view(of)


def _move(machine: Machine, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind = instruction.opcode[1]
    if isinstance(to, Vector):
        part = f"u{WIDTHS[kind] // 8 // len(to.parts)}"
        columns = (
            np.broadcast_to(machine.value(source, kind), machine.n).copy().view(part).reshape(machine.n, -1)
        )
        for operand, column in zip(to.parts, columns.T, strict=True):
            machine.write(instruction, operand, np.ascontiguousarray(column), "b")
    elif isinstance(source, Vector):
        part_kind = f"b{WIDTHS[kind] // len(source.parts)}"
        columns = np.stack([np.broadcast_to(machine.value(x, part_kind), machine.n) for x in source.parts], 1)
        machine.write(
            instruction, to, np.ascontiguousarray(columns).view(f"u{WIDTHS[kind] // 8}")[:, 0], kind
        )
    else:
        machine.write(instruction, to, machine.value(source, kind), kind)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _addresses(machine: Machine, instruction: Instruction, at: Operand, mask: NDArray, total: int) -> Bits:
    if not isinstance(at, Address):
        raise UnknownInstruction(instruction)
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
    mask = machine.mask(instruction)
    if space != "global":
        raise UnknownInstruction(instruction)
    if not mask.any():
        return
    parts = _parts(to)
    addresses = _addresses(machine, instruction, at, mask, width * len(parts))
    for i, part in enumerate(parts):
        words = np.zeros(machine.n, f"u{width}")
        words[mask] = machine.memory.load(machine.lanes[mask], addresses + np.uint64(i * width), width)
        machine.write(instruction, part, words, kind)
    machine.loads[machine.now] = machine.memory.end_of_load()


def _store(machine: Machine, instruction: Instruction) -> None:
    at, what = instruction.operands
    _, space, *_, kind = instruction.opcode
    if space != "global":
        raise UnknownInstruction(instruction)
    mask = machine.mask(instruction)
    if not mask.any():
        return
    width = WIDTHS[kind] // 8
    parts = _parts(what)
    addresses = _addresses(machine, instruction, at, mask, width * len(parts))
    store = machine.now

    def waits_for() -> list[int]:
        return [machine.loads[load] for load in loads_handed_over(machine.program, store)]

    for i, part in enumerate(parts):
        words = np.broadcast_to(machine.value(part, f"b{8 * width}"), machine.n)
        machine.memory.store(machine.lanes[mask], addresses + np.uint64(i * width), words[mask], waits_for)


def _prefetch(machine: Machine, instruction: Instruction) -> None:
    """Nothing but a check of the address."""
    mask = machine.mask(instruction)
    if mask.any():
        machine.memory.touch(_addresses(machine, instruction, instruction.operands[0], mask, 1))


def _barrier(machine: Machine, instruction: Instruction) -> None:
    if instruction.operands != (Immediate(0),):  # not one of all lanes
        raise UnknownInstruction(instruction)
    machine.whole(machine.threads, instruction)
    machine.memory.barriers[np.unique(machine.lanes[machine.active] // machine.threads)] += 1


def _reduce(machine: Machine, instruction: Instruction) -> None:
    """redux.sync of whole warps."""
    machine.whole(WARP, instruction)
    to, source, _ = instruction.operands
    _, _, name, kind = instruction.opcode
    rows = np.broadcast_to(machine.value(source, kind), machine.n).reshape(-1, WARP)
    reduced = {"min": np.minimum, "max": np.maximum, "add": np.add}[name].reduce(rows, axis=1)
    machine.write(instruction, to, np.repeat(reduced.astype(rows.dtype), WARP), kind)


def _shuffle(machine: Machine, instruction: Instruction) -> None:
    """shfl.sync of whole warps: from the lane with this number, or with one that differs in these bits."""
    machine.whole(WARP, instruction)
    to, source, which, clamp, _ = instruction.operands
    kind = instruction.opcode[2]
    if kind not in ("idx", "bfly") or clamp != Immediate(WARP - 1):
        raise UnknownInstruction(instruction)
    chosen = np.broadcast_to(machine.value(which, "b32"), machine.n).astype(np.int64) % WARP
    warp, lane = np.divmod(machine.lanes, WARP)
    partner = WARP * warp + (chosen if kind == "idx" else lane ^ chosen)
    machine.write(instruction, to, np.broadcast_to(machine.value(source, "b32"), machine.n)[partner], "b32")


_SPECIAL: dict[str, Callable[[Machine, Instruction], None]] = {
    "mov": _move, "ld": _load, "st": _store, "prefetch": _prefetch, "bar": _barrier, "redux": _reduce, "shfl": _shuffle,
}  # fmt: skip
