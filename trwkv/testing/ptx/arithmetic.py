"""What PTX instructions compute, on numpy arrays with one entry per lane. Source: NVIDIA's PTX ISA, version 8.7.

Registers hold bits: bool, uint16, uint32 or uint64. Approximate instructions err here as much as the ISA lets them, by
an amount that depends on the result's mantissa alone.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Bits = NDArray

WIDTHS = {"pred": 0, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16} | {
    f"{kind}{n}": n for kind in "busf" for n in (32, 64)
} | {"bf16x2": 32, "f16x2": 32}  # fmt: skip
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype(kind: str) -> np.dtype:
    """How numpy holds an operand of this PTX type."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in ("bf16", "bf16x2", "f16x2"):
        return np.dtype(f"u{WIDTHS[kind] // 8}")
    return np.dtype(f"{_KINDS[kind[0]]}{WIDTHS[kind] // 8}")


def from_bfloat16(x: Bits) -> Bits:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Bits) -> Bits:
    """Rounded to nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flushed(x: Bits) -> Bits:
    """Denormal float32 become zero, of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def approximate(exact: Bits, ulps: int) -> Bits:
    """Float32, up to so many units in the last place away, but for powers of two, infinities and NaN."""
    x = exact.astype(np.float32)
    bits = x.view(np.uint32)
    mantissa = bits & 0x7FFFFF
    error = (mantissa * np.uint32(2654435761) >> np.uint32(16)) % np.uint32(2 * ulps + 1)
    return np.where(mantissa == 0, bits, bits + error - np.uint32(ulps)).view(np.float32)


def fma(a: Bits, b: Bits, c: Bits) -> Bits:
    """Rounded once: for float32 by way of float64, which rounds twice in one case of 2^29."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def shift_left(a: Bits, n: Bits) -> Bits:
    width = a.dtype.itemsize * 8
    return np.where(n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Bits, n: Bits) -> Bits:
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < width, shifted, a.dtype.type(0))


def bit_field(a: Bits, position: Bits, length: Bits) -> Bits:
    """bfe for fields within the register."""
    width = a.dtype.itemsize * 8
    up = np.array(width, np.uint32) - position - length
    return shift_right(shift_left(a, up), up + position)


def permuted(a: Bits, b: Bits, selector: Bits) -> Bits:
    """prmt in its default mode: each byte of the result is one of the eight of a and b."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(both)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(choice & np.uint32(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def extreme(a: Bits, b: Bits, *, larger: bool, nan: bool) -> Bits:
    """The larger or the smaller: of one number and NaN the number, unless `nan`, then NaN."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if larger else np.minimum(a, b)
    choose = (np.maximum if larger else np.minimum) if nan else (np.fmax if larger else np.fmin)
    return choose(a, b)


def extreme_of_pairs(a: Bits, b: Bits, *, larger: bool, kind: str) -> Bits:
    """The same with NaN for each half of 32 bits."""
    out = np.zeros_like(a)
    for shift in (0, 16):
        x, y = ((r >> np.uint32(shift)).astype(np.uint16) for r in (a, b))
        if kind == "bf16x2":
            half = to_bfloat16(extreme(from_bfloat16(x), from_bfloat16(y), larger=larger, nan=True))
        else:
            half = extreme(x.view(np.float16), y.view(np.float16), larger=larger, nan=True).view(np.uint16)
        out |= half.astype(np.uint32) << np.uint32(shift)
    return out


def compare(name: str) -> Callable[[Bits, Bits], Bits]:
    """Of setp. A name that ends in u holds as well where one of them is NaN."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
             "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # fmt: skip
    if name in plain:
        if name == "ne":  # numpy's holds for NaN, PTX's does not
            return lambda a, b: (a != b) & (a == a) & (b == b)
        return plain[name]
    ordered = compare(name[:-1])
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def convert(to: str, source: str, modifiers: tuple[str, ...]) -> Callable[[Bits], Bits]:
    """cvt from one type to another; rounds to nearest unless a modifier says how to an integer."""
    roundings = {"rpi": np.ceil, "rmi": np.floor, "rzi": np.trunc, "rni": np.rint}
    integer = next((roundings[m] for m in modifiers if m in roundings), None)
    flush = flushed if "ftz" in modifiers else lambda x: x

    def cvt(x: Bits) -> Bits:
        value = from_bfloat16(x) if source == "bf16" else x
        if value.dtype == np.float32:
            value = flush(value)
        if integer is not None:
            value = integer(value)
        if to == "bf16":
            return to_bfloat16(value.astype(np.float32))
        target = dtype(to)
        if value.dtype.kind == "f" and target.kind != "f":  # NaN becomes 0, and what is too large the limit
            limits = np.iinfo(target)
            value = np.clip(np.nan_to_num(value.astype(np.longdouble)), limits.min, limits.max)
        return value.astype(target)

    return cvt


def packed(high: Bits, low: Bits, *, kind: str) -> Bits:
    """cvt of two float32 to one register."""
    if kind == "bf16x2":
        halves = [to_bfloat16(x) for x in (high, low)]
    else:
        halves = [x.astype(np.float16).view(np.uint16) for x in (high, low)]
    return (halves[0].astype(np.uint32) << np.uint32(16)) | halves[1]


def exp2_approximate(x: Bits) -> Bits:
    return flushed(approximate(np.exp2(flushed(x).astype(np.float64)), 2))


def reciprocal_approximate(x: Bits) -> Bits:
    return flushed(approximate(1.0 / flushed(x).astype(np.float64), 1))


def wide(op: Callable, a: Bits, b: Bits, *c: Bits) -> Bits:
    """Of 32-bit factors the whole product, 64 bits."""
    target = np.dtype(f"{a.dtype.kind}8")
    product = a.astype(target) * b.astype(target)
    return op(product, *(x.view(target) for x in c))


def quotient(a: Bits, b: Bits) -> Bits:
    """Of integers, towards zero."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, divisor)) // divisor


BINARY = {
    "div": quotient, "rem": np.fmod,
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": shift_left, "shr": shift_right,
    "max": partial(extreme, larger=True, nan=False), "min": partial(extreme, larger=False, nan=False),
}  # fmt: skip
