"""The Triton kernel: one program per row and block of channels reads x, the row before and the mixes once.

It rounds where the plain PyTorch form does, `x - shifted` and the result to x's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from trwkv.ops._dispatch import LAUNCH_OPTIONS, device_guard, is_interpreting
from trwkv.ops._interpreter import prepare_interpreter
from trwkv.ops.token_shift_mix import MAX_MIXES
from trwkv.ops.wkv.kernel_math import load_row, store_row

if is_interpreting():
    prepare_interpreter()

BLOCK_C = 256


@triton.jit(do_not_specialize_on_alignment=["T"])
def token_shift_mix_kernel(
    x,  # [B T, C]
    previous,  # [B, C], if HAS_PREVIOUS
    mix_0, mix_1, mix_2,  # [R, M] each, M = C or a divisor of it
    out_0, out_1, out_2,  # [B T, R, C]
    T,
    C: tl.constexpr,
    M_0: tl.constexpr, M_1: tl.constexpr, M_2: tl.constexpr,
    R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,  # 0: there is no such mix
    BLOCK_C: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
):  # fmt: skip
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    here = load_row(x + row * C, c, C, BLOCK_C, 0.0)
    if row % T > 0:
        shifted = load_row(x + (row - 1) * C, c, C, BLOCK_C, 0.0)
    elif HAS_PREVIOUS:
        shifted = load_row(previous + (row // T) * C, c, C, BLOCK_C, 0.0)
    else:
        shifted = tl.zeros_like(here)
    dtype: tl.constexpr = x.dtype.element_ty
    shifted = shifted.to(tl.float32)
    delta = (here.to(tl.float32) - shifted).to(dtype).to(tl.float32)
    store_mixed(out_0, mix_0, row, c, shifted, delta, C, M_0, R_0, BLOCK_C)
    store_mixed(out_1, mix_1, row, c, shifted, delta, C, M_1, R_1, BLOCK_C)
    store_mixed(out_2, mix_2, row, c, shifted, delta, C, M_2, R_2, BLOCK_C)


@triton.jit
def store_mixed(
    out, mix, row, c, shifted, delta,
    C: tl.constexpr, M: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`shifted + mix * delta` to all R rows of one output."""
    for r in tl.static_range(R):
        weight = tl.load(mix + r * M + c % M, mask=c < C, other=0.0).to(out.dtype.element_ty).to(tl.float32)
        store_row(out + (row * R + r) * C, c, tl.fma(weight, delta, shifted), C, BLOCK_C)


def token_shift_mix_forward(x: Tensor, mixes: list[Tensor], previous: Tensor | None) -> list[Tensor]:
    """x [B, T, C] and previous [B, C], or with a P axis before C; mixes [C] or [P, C]. All validated."""
    B, T, *axes, C = x.shape
    x, previous = x.contiguous(), None if previous is None else previous.contiguous()
    rows = [len(mix) if mix.ndim == 2 and not axes else 1 for mix in mixes]
    shapes = [(B, T, *axes, C) if mix.ndim == 1 or axes else (B, T, len(mix), C) for mix in mixes]
    outputs = [x.new_empty(shape) for shape in shapes]
    missing = MAX_MIXES - len(mixes)
    width = C * (axes[0] if axes else 1)
    widths = [mix.numel() // r for mix, r in zip(mixes, rows, strict=True)] + [1] * missing
    rows += [0] * missing
    if x.numel():
        with device_guard(x.device):
            token_shift_mix_kernel[(B * T * triton.cdiv(width, BLOCK_C),)](
                x, previous,
                *(mix.contiguous() for mix in mixes), *[None] * missing,
                *outputs, *[None] * missing,
                T, C=width,
                M_0=widths[0], M_1=widths[1], M_2=widths[2], R_0=rows[0], R_1=rows[1], R_2=rows[2],
                BLOCK_C=BLOCK_C, HAS_PREVIOUS=previous is not None, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return outputs
