"""What PTX instructions compute, on numpy arrays with one entry per lane. Source: NVIDIA's PTX ISA, version 8.7.

Registers hold bits: bool, uint16, uint32 or uint64. Approximate instructions err here as much as the ISA lets them, by
an amount that depends on the result's mantissa alone.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Bits = NDArray

WIDTHS = {"pred": 0, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16} | {
    f"{kind}{n}": n for kind in "busf" for n in (32, 64)
} | {"bf16x2": 32, "f16x2": 32, "f32x2": 64}  # fmt: skip
PACKED = ("bf16", "bf16x2", "f16x2", "f32x2")
"""Types that numpy does not have: bits."""
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype(kind: str) -> np.dtype:
    """How numpy holds an operand of this PTX type."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in PACKED:
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


def permute_bytes(a: Bits, b: Bits, selector: Bits) -> Bits:
    """prmt: those of the eight bytes of a and b with these numbers, four bits each; a sign where the fourth is set."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(source, selector).shape, np.uint32)
    for i in range(4):
        field = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = source >> (field & 7) * 8 & 255
        byte = np.where(field & 8, (byte >> 7) * 255, byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def extreme(*xs: Bits, larger: bool, nan: bool = False) -> Bits:
    """The largest or the smallest: of numbers and NaN a number, unless `nan`, then NaN."""
    if nan or xs[0].dtype.kind != "f":
        return reduce(np.maximum if larger else np.minimum, xs)
    return reduce(np.fmax if larger else np.fmin, xs)


def of_halves(operation: Callable[..., Bits], kind: str) -> Callable[..., Bits]:
    """An operation on float32 or float16 as one on bits of bfloat16, or of two numbers side by side."""
    if kind == "bf16":
        return lambda *xs: to_bfloat16(operation(*(from_bfloat16(x) for x in xs)))
    if not kind.endswith("x2"):
        number = dtype(kind)
        return lambda *xs: operation(*(x.view(number) for x in xs)).view(f"u{number.itemsize}")
    half = of_halves(operation, kind.removesuffix("x2"))

    def both(*xs: Bits) -> Bits:
        n = xs[0].itemsize // 2
        return joined([half(*parts) for parts in zip(*(halves(x, n) for x in xs), strict=True)])

    return both


def halves(x: Bits, n: int) -> list[Bits]:
    """The lower and the upper n bytes."""
    return [(x >> x.dtype.type(shift)).astype(f"u{n}") for shift in (0, 8 * n)]


def joined(parts: list[Bits]) -> Bits:
    low, high = (x.astype(f"u{2 * x.itemsize}") for x in parts)
    return low | high << high.dtype.type(4 * high.itemsize)


COMPARISONS: dict[str, Callable[[Bits, Bits], Bits]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b),  # not of NaN
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


def compare(name: str) -> Callable[[Bits, Bits], Bits]:
    """Of setp. A name that ends in u holds as well where one of them is NaN."""
    if name in COMPARISONS:
        return COMPARISONS[name]
    ordered = COMPARISONS[name[:-1]]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


TO_INTEGERS = {"rpi": np.ceil, "rmi": np.floor, "rzi": np.trunc, "rni": np.rint}


def convert(to: str, source: str, rounding: str | None = None) -> Callable[[Bits], Bits]:
    """cvt from one type to another: to the nearest number, unless `rounding` says to which integer."""

    def cvt(x: Bits) -> Bits:
        value = from_bfloat16(x) if source == "bf16" else x
        if rounding is not None:
            value = TO_INTEGERS[rounding](value)
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
        return joined([to_bfloat16(x) for x in (low, high)])
    return joined([x.astype(np.float16).view(np.uint16) for x in (low, high)])


def exp2_approximate(x: Bits) -> Bits:
    return approximate(np.exp2(x.astype(np.float64)), 2)


def reciprocal_approximate(x: Bits) -> Bits:
    return approximate(1.0 / x.astype(np.float64), 1)


def quotient(a: Bits, b: Bits) -> Bits:
    """Of integers, towards zero; of numbers, rounded."""
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, divisor)) // divisor


def multiply_wide(a: Bits, b: Bits, c: Bits | None = None) -> Bits:
    """The whole product of factors of up to 32 bits, to which a number of 64 bits may be added."""
    wide = np.dtype(f"{a.dtype.kind}8")
    product = a.astype(wide) * b.astype(wide)
    return product if c is None else product + c


def multiply_high(a: Bits, b: Bits) -> Bits:
    """The upper half of the product of factors of 16 or 32 bits."""
    return (multiply_wide(a, b) >> 8 * a.dtype.itemsize).astype(a.dtype)


def select(a: Bits, b: Bits, is_first: Bits) -> Bits:
    return np.where(is_first, a, b)
