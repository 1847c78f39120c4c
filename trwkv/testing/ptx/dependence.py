"""Which loads a store must wait for, because what it stores was made of what they gave."""

from trwkv.testing.ptx.parse import Address, Immediate, Operand, Program, Vector


def loads_handed_over(program: Program, store: int) -> set[int]:
    """The loads, as numbers of instructions, that the value of this store comes from by way of a shuffle.

    A shuffle takes a register of all lanes of a warp, and so waits until each of them has loaded it; what is stored
    then, overwrites nothing that a lane of this warp has yet to load. Looked for back to the last instruction that
    a branch leads to: further back another way may have led here.
    """
    targets = {program.labels[str(x.operands[-1])] for x in program.instructions if x.opcode[0] == "bra"}
    stored = _registers(program.instructions[store].operands[1:])
    wanted = dict.fromkeys(stored, False)  # is it shuffled on its way?
    found = set()
    at = store
    while at > 0 and at not in targets:
        at -= 1
        instruction = program.instructions[at]
        name = instruction.opcode[0]
        if name in ("st", "prefetch", "bar", "bra"):  # they give nothing
            continue
        given = _registers(instruction.operands[:1])
        is_shuffled = any(wanted.get(register, False) for register in given)
        is_wanted = any(register in wanted for register in given)
        if instruction.guard is None:
            for register in given:
                wanted.pop(register, None)
        if not is_wanted:
            continue
        if name == "ld":
            if is_shuffled:
                found.add(at)
            continue
        for register in _registers(instruction.operands[1:]):
            wanted[register] = wanted.get(register, False) or is_shuffled or name == "shfl"
    return found


def _registers(operands: tuple[Operand, ...]) -> list[str]:
    out = []
    for operand in operands:
        if isinstance(operand, Vector):
            out += _registers(operand.parts)
        elif not isinstance(operand, Address | Immediate):
            out.append(operand)
    return out
