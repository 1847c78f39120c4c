"""What the kernels write for a token: outputs, their weighted sums, gated ones, states."""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import load_row, scale_exactly, sigmoid, store_row, user_exponent, zeros


@triton.jit
def channel_weights(
    weights, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr
):
    """Aggregation weights [P, C], if they are such, to be loaded once for a tile."""
    out = zeros(P, BLOCK_C)
    if WEIGHTS == "channel":
        out = ()
        for p in tl.static_range(P):
            out += (load_row(weights + p * C, c, C, BLOCK_C, 0.0).to(tl.float32),)
    return out


@triton.jit
def token_weights(weights, of_channels, row, P: tl.constexpr, WEIGHTS: tl.constexpr, GROUPS: tl.constexpr):
    """Aggregation weights of one token (`row` counts tokens over the batch)."""
    out = of_channels
    if WEIGHTS == "token":
        out = ()
        for p in tl.static_range(P):
            out += (tl.load(weights + row * (P * GROUPS) + p).to(tl.float32),)
    return out


@triton.jit
def weights_of_tokens(
    weights, of_channels, row, P: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """`token_weights` of N tokens, one after the other: to be loaded before what those tokens store, for after a store
    the compiler moves no load before it, and every token would wait for its own.
    """
    out = ()
    for j in tl.static_range(N):
        out += token_weights(weights, of_channels, row + j * STEP, P, WEIGHTS, GROUPS)
    return out


@triton.jit
def of_token(rows, j: tl.constexpr, P: tl.constexpr):
    """The P numbers of token j among those of several tokens."""
    out = ()
    for p in tl.static_range(P):
        out += (rows[j * P + p],)
    return out


@triton.jit
def sum_so_far(
    output, row, c,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_T tokens, what the groups before this one add to the output; zeros, never used, for the first."""
    _, partial = output
    out = ()
    for j in tl.static_range(BLOCK_T):
        if GROUP == "only" or GROUP == "first":
            out += (tl.zeros([BLOCK_C], tl.float32),)
        else:
            out += (load_row(partial + (row + j * STEP) * (C // GROUPS), c, C, BLOCK_C, 0.0),)
    return out


@triton.jit
def store_output(
    output, so_far, row, c, y, w,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y, one [BLOCK_C] per perspective, to output [.., P, C]; or their sum, weighted by w, which `so_far` begins unless
    this group is the first, to [.., C / GROUPS].
    """
    total_ptr, partial = output
    if WEIGHTS == "none":
        for p in tl.static_range(P):
            store_row(total_ptr + (row * P + p) * C, c, y[p], C, BLOCK_C)
    else:
        if GROUP == "only" or GROUP == "first":
            total = w[0] * y[0]
        else:
            total = tl.fma(w[0], y[0], so_far)
        for p in tl.static_range(1, P):
            total = tl.fma(w[p], y[p], total)
        if GROUP == "only" or GROUP == "last":
            store_row(total_ptr + row * (C // GROUPS), c, total, C, BLOCK_C)
        else:
            store_row(partial + row * (C // GROUPS), c, total, C, BLOCK_C)


@triton.jit
def gated(
    y, receptance, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y, one [BLOCK_C] per perspective, times the sigmoid of receptance [.., P, C], or [.., C] if y is to be summed."""
    out = ()
    for p in tl.static_range(P):
        if WEIGHTS == "none":
            p_receptance = receptance + (row * P + p) * C
        else:
            p_receptance = receptance + row * C
        out += (y[p] * sigmoid(load_row(p_receptance, c, C, BLOCK_C, 0.0).to(tl.float32), PTX),)
    return out


@triton.jit
def store_token_state(
    output, plane, row, c, A, B, O, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The state before the token in `row`, as the user sees it, to output [3, rows, P, C]."""
    for p in tl.static_range(P):
        exp, scale = user_exponent(O[p])
        p_output = output + (row * P + p) * C
        store_row(p_output, c, scale_exactly(A[p], scale), C, BLOCK_C)
        store_row(p_output + plane, c, scale_exactly(B[p], scale), C, BLOCK_C)
        store_row(p_output + plane + plane, c, exp, C, BLOCK_C)
