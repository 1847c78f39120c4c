"""The gradient of [B, T, P] weights, which sums over channels, from the shares that the blocks of channels left."""

import triton
import triton.language as tl

AHEAD = tl.constexpr(8)
"""Shares that are loaded together."""


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def wkv_block_sums_kernel(
    shares,  # [GROUPS, n_blocks, n_rows, P], float32
    output,  # [n_rows, P GROUPS]
    n_rows,
    n_blocks,
    P: tl.constexpr,  # 1 where there are groups
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the first block to the last, whatever the number of rows: a sum whose order depended on it would make a
    sequence's gradient depend, in its last bits, on its neighbours.
    """
    group = tl.program_id(0) % GROUPS
    plane = n_rows.to(tl.int64) * P
    at = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < plane
    p_share = shares + group * n_blocks * plane + at
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n_blocks, AHEAD):
        x = ()
        for j in tl.static_range(AHEAD):
            x += (tl.load(p_share + (i + j) * plane, mask=is_there & (i + j < n_blocks), other=0.0),)
        for j in tl.static_range(AHEAD):
            total += x[j]
    tl.store(output + at * GROUPS + group, total.to(output.dtype.element_ty), mask=is_there)
