"""The output's gradient, as the backward's kernels read it."""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import load_row


@triton.jit
def load_grad_rows(
    p_grad, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STRIDE: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The output's gradient at BLOCK_T tokens, as memory has it: a row for each perspective, or one for their sum."""
    N: tl.constexpr = P if WEIGHTS == "none" else 1
    out = ()
    for i in tl.static_range(BLOCK_T * N):
        out += (load_row(p_grad + (i // N) * STRIDE + (i % N) * C, c, C, BLOCK_C, 0.0),)
    return out


@triton.jit
def load_grads(
    p_grad, row, c, missing, old, C: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The output's gradient at BLOCK_T tokens: a row for each perspective or one for their sum; else as `load_rows`."""
    N: tl.constexpr = P if WEIGHTS == "none" else 1
    WIDTH: tl.constexpr = 1 if PAIRED is None else 2
    is_there = c + missing * C < C // WIDTH
    out = ()
    for i in tl.static_range(BLOCK_T * N):
        p_row = p_grad + (row + (i // N) * STEP) * (N * C // GROUPS // WIDTH) + (i % N) * (C // WIDTH)
        out += (tl.load(p_row + c, mask=is_there, other=old[i]),)
    return out


@triton.jit
def grad_of_y(
    rows, j: tl.constexpr, weight, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr
):  # fmt: skip
    """Gradient of each perspective's y at token j of these rows, whose weights are given, and that of the aggregated
    output (zero when there is none).
    """
    out = ()
    if WEIGHTS == "none":
        g = tl.zeros([BLOCK_C], tl.float32)
        for p in tl.static_range(P):
            out += (rows[j * P + p].to(tl.float32),)
    else:
        g = rows[j].to(tl.float32)
        for p in tl.static_range(P):
            out += (g * weight[p],)
    return out, g
