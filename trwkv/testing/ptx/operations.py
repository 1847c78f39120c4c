"""Which function on arrays stands for an instruction of PTX. What is not listed here is refused."""

from collections.abc import Callable
from functools import partial

import numpy as np

from trwkv.testing.ptx.arithmetic import (
    PACKED,
    TO_INTEGERS,
    Bits,
    bit_field,
    compare,
    convert,
    exp2_approximate,
    extreme,
    flushed,
    fma,
    multiply_high,
    multiply_wide,
    of_halves,
    packed,
    permute_bytes,
    quotient,
    reciprocal_approximate,
    select,
    shift_left,
    shift_right,
)
from trwkv.testing.ptx.parse import Instruction

SIMPLE: dict[str, tuple[Callable[..., Bits], int, set[str]]] = {
    "add": (np.add, 2, {"rn"}),
    "sub": (np.subtract, 2, {"rn"}),
    "mul": (np.multiply, 2, {"rn", "lo"}),
    "mad": (lambda a, b, c: a * b + c, 3, {"lo"}),
    "fma": (fma, 3, {"rn"}),
    "div": (quotient, 2, {"rn"}),
    "rem": (np.fmod, 2, set()),
    "neg": (np.negative, 1, set()),
    "abs": (np.abs, 1, {"ftz"}),
    "and": (np.bitwise_and, 2, set()),
    "or": (np.bitwise_or, 2, set()),
    "xor": (np.bitwise_xor, 2, set()),
    "not": (np.invert, 1, set()),
    "max": (partial(extreme, larger=True), 2, {"NaN"}),
    "min": (partial(extreme, larger=False), 2, {"NaN"}),
    "prmt": (permute_bytes, 3, set()),
    "ex2": (exp2_approximate, 1, {"approx", "ftz"}),
    "rcp": (reciprocal_approximate, 1, {"approx", "ftz"}),
}
"""Instructions whose operands are all of their type: what they compute, of how many, and with which modifiers."""


class UnknownInstruction(NotImplementedError):
    def __init__(self, instruction: Instruction) -> None:
        super().__init__(f"ptx: no way to run {instruction}")


def operation_of(instruction: Instruction) -> tuple[Callable[..., Bits], list[str], str]:
    """What an instruction computes, the types of what it takes and of what it gives."""
    name, *modifiers, kind = instruction.opcode
    if name == "cvt":
        return _conversion(instruction)
    if name == "setp" and len(modifiers) == 1:
        return compare(modifiers[0]), [kind, kind], "pred"
    if name == "selp":
        return select, [kind, kind, "pred"], kind
    if name in ("shl", "shr"):
        return (shift_left if name == "shl" else shift_right), [kind, "u32"], kind
    if name == "bfe":
        return bit_field, [kind, "u32", "u32"], kind
    if modifiers == ["wide"] and kind in ("s32", "u32"):
        result = f"{kind[0]}64"
        return multiply_wide, [kind, kind] + [result] * (name == "mad"), result
    if (name, modifiers) == ("mul", ["hi"]) and kind in ("s16", "u16", "s32", "u32"):
        return multiply_high, [kind, kind], kind
    if name in SIMPLE and set(modifiers) <= SIMPLE[name][2]:
        operation, count, _ = SIMPLE[name]
        if name in ("max", "min"):
            count = len(instruction.operands) - 1  # three from sm_100 on
        if "NaN" in modifiers:
            operation = partial(operation, nan=True)
        if "ftz" in modifiers:
            operation = _flushing(operation)
        if kind == "f32" and name not in ("neg", "abs"):
            operation = _canonical(operation)
        return of_halves(operation, kind) if kind in PACKED else operation, [kind] * count, kind
    raise UnknownInstruction(instruction)


def _conversion(instruction: Instruction) -> tuple[Callable[..., Bits], list[str], str]:
    _, *modifiers, to, source = instruction.opcode
    if not set(modifiers) <= {"rn", "ftz", *TO_INTEGERS}:
        raise UnknownInstruction(instruction)
    if len(instruction.operands) == 3:
        return partial(packed, kind=to), [source, source], "b32"
    rounding = next((m for m in modifiers if m in TO_INTEGERS), None)
    operation = _canonical(convert(to, source, rounding))
    return _flushing(operation) if "ftz" in modifiers else operation, [source], to


def _flushing(operation: Callable[..., Bits]) -> Callable[..., Bits]:
    """With denormal float32 as zeros, before and after."""

    def flush(x: Bits) -> Bits:
        return flushed(x) if x.dtype == np.float32 else x

    return lambda *xs: flush(operation(*(flush(x) for x in xs)))


def _canonical(operation: Callable[..., Bits]) -> Callable[..., Bits]:
    """With the one NaN that arithmetic on float32 gives, whose bits kernels may go on with."""

    def canonical(*xs: Bits) -> Bits:
        x = operation(*xs)
        if x.dtype == np.float32 and (is_nan := np.isnan(x)).any():
            x = np.where(is_nan, np.uint32(0x7FFFFFFF), x.view(np.uint32)).view(np.float32)
        return x

    return canonical
