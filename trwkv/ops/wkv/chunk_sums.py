"""What each chunk but a sequence's last adds to an empty state: the forward's first walk where T is divided.

The tokens of a tile are summed in running order, from an empty state, but the tiles from the last to the first: each
is decayed by what comes behind it,

    A = sum over tiles of R J,   R = W^(tokens of the chunk behind the tile),   J = sum_j W^(L-1-j) e_j v_j    (B alike)

So the first tokens of every chunk are read last, and the second walk, which begins with them, finds them in the L2
cache if it is large enough. A chunk that is not the last one has whole tiles alone.
MATH.md, section 2: What a chunk adds.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    SAFE_BITS,
    SAFE_TOP,
    carry,
    empty_state,
    exact_update,
    exp_near,
    exponent_above,
    exponent_near,
    load_decay,
    load_row,
    ones,
    pow2,
    split_k,
    store_triple,
    zeros,
)
from trwkv.ops.wkv.kernel_rows import locate_chunk
from trwkv.ops.wkv.kernel_tiles import (
    extremes,
    load_rows,
    load_tile,
    no_tile,
    prefetch_rows,
    tile_source,
    widen,
)
from trwkv.ops.wkv.kernel_unit import split


@triton.jit(do_not_specialize=["T", "chunk_len", "n_chunks", "n_sequences"])
def wkv_chunk_sums_kernel(
    w,  # [P, C]
    k,  # [rows, C]: B T rows, or those of all packed sequences
    v,  # [rows, C]
    cu_seqlens,  # [N + 1] if VARLEN
    chunks,  # [programs along T, 3, P, C]: what each chunk adds
    T,
    chunk_len,
    n_chunks,
    n_sequences,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    STEP: tl.constexpr = -1 if REVERSE else 1
    c0 = (tl.program_id(0) % n_blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // n_blocks
    _, _, length, row0, begin, end = locate_chunk(
        cu_seqlens, index, T, chunk_len, n_chunks, n_sequences, VARLEN, False, REVERSE
    )
    if end == length:  # what the last chunk adds nobody needs; or no chunk at all
        return

    decay, _, decay_exponent = load_decay(w, c, 1.0, C, P, BLOCK_C)
    tile_decay, tile_decay_low, tile_exponent = load_decay(w, c, BLOCK_T * 1.0, C, P, BLOCK_C)
    limit = tl.zeros_like(decay[0]) - SAFE_BITS
    for p in tl.static_range(P):
        limit = tl.where(BLOCK_T * decay_exponent[p] <= SAFE_BITS, limit, float("inf"))
    A, B, O = empty_state(P, BLOCK_C)
    rest = zeros(2 * P, BLOCK_C)
    R = ones(P, BLOCK_C) + zeros(2 * P, BLOCK_C)
    source = tile_source(k, v, c0, c, BLOCK_C, PAIRED)
    tile = no_tile(source, BLOCK_T)
    top = limit
    is_fast = begin > end  # nor does the tile behind the last do anything but load that
    for behind in range(-BLOCK_T, chunk_len, BLOCK_T):
        t0 = end - BLOCK_T - behind
        ahead = tl.maximum(t0 - 2 * BLOCK_T, begin)
        prefetch_rows(k, row0, ahead, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
        prefetch_rows(v, row0, ahead, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
        row = row0 + t0 * STEP
        next_row = row - BLOCK_T * STEP
        missing = tl.maximum(begin + BLOCK_T - t0, 0)  # tokens that the next tile lacks: all or none
        A_tile, B_tile, O_tile = empty_state(P, BLOCK_C)
        if is_fast:
            A_tile, B_tile, O_tile, tile, k_max, k_min = fast_sums(
                decay, decay_exponent, top, tile, source, next_row, missing,
                C, P, BLOCK_C, BLOCK_T, STEP, PAIRED, PTX,
            )  # fmt: skip
        else:
            if behind >= 0:
                A_tile, B_tile, O_tile = exact_sums(
                    decay, decay_exponent, k, v, row, c, C, P, BLOCK_C, BLOCK_T, STEP
                )
            tile = no_tile(source, BLOCK_T)
            tile = load_tile(source, next_row, missing, tile, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
            k_max, k_min = extremes(tile[0], PAIRED, PTX, BLOCK_T)
        if behind >= 0:
            A, B, O, rest, R = add_tile(
                A, B, O, rest, R, A_tile, B_tile, O_tile, tile_decay, tile_decay_low, tile_exponent, P
            )
        top = exponent_near(k_max)
        is_safe = (exponent_near(k_min) - top >= limit) & (tl.abs(top) <= SAFE_TOP)  # not with NaN
        is_fast = tl.min(is_safe.to(tl.int32), 0) > 0

    A, B, O, _ = split(A, B, O, (), False, P)
    store_triple(chunks + index.to(tl.int64) * (3 * P * C), c, A, B, O, C, P, BLOCK_C)


@triton.jit
def fast_sums(
    decay, decay_exponent, top, tile, source, next_row, missing,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The sums of a tile's tokens in one exponent, `top`; the next tile, whose rows take the registers of this; and its
    largest and smallest k.
    """
    k_rows, v_rows = tile
    p_k, p_v, c_tile = source
    W = ()
    for p in tl.static_range(P):
        W += (decay[p] * pow2(decay_exponent[p]),)
    A = zeros(P, BLOCK_C)
    B = zeros(P, BLOCK_C)
    e_rows = ()
    for j in tl.static_range(BLOCK_T):
        e_rows += (exp_near(widen(k_rows[j], PAIRED), top),)
    k_rows = load_rows(p_k, next_row, c_tile, missing, k_rows, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    next_v_rows = ()
    for j in tl.static_range(BLOCK_T):
        if j == (BLOCK_T * 3) // 4:  # at the end they would wait for the last rows of v, too
            k_max, k_min = extremes(k_rows, PAIRED, PTX, BLOCK_T)
        e = e_rows[j]
        ev = e * widen(v_rows[j], PAIRED)
        next_v_rows += load_rows(
            p_v, next_row + j * STEP, c_tile, missing, (v_rows[j],), C, BLOCK_C, 1, STEP, PAIRED
        )
        A_next = ()
        B_next = ()
        for p in tl.static_range(P):
            A_next += (tl.fma(A[p], W[p], ev),)
            B_next += (tl.fma(B[p], W[p], e),)
        A = A_next
        B = B_next
    O = ()
    for _ in tl.static_range(P):
        O += (top,)
    return A, B, O, (k_rows, next_v_rows), k_max, k_min


@triton.jit
def exact_sums(
    decay, decay_exponent, k, v, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The same roundings as `fast_sums` with an exponent per perspective and step: any data."""
    A, B, O = empty_state(P, BLOCK_C)
    for i in range(BLOCK_T):
        i_row = row + i * STEP
        e, exponent = split_k(load_row(k + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        A_next = ()
        B_next = ()
        O_next = ()
        for p in tl.static_range(P):
            a, b, o, _, _ = exact_update(
                A[p], B[p], O[p], A[p], B[p], decay[p], decay_exponent[p], e, exponent, i_v
            )
            A_next += (a,)
            B_next += (b,)
            O_next += (o,)
        A = A_next
        B = B_next
        O = O_next
    return A, B, O


@triton.jit
def add_tile(
    A, B, O, rest, R, A_tile, B_tile, O_tile, tile_decay, tile_decay_low, tile_exponent, P: tl.constexpr
):  # fmt: skip
    """The chunk's sums with those of a tile, decayed by R; and R of the tile before it.

    `rest` is what rounding took from A, then from B. R: P mantissas in [0.5, 1], what rounding took from them, and
    their exponents.
    """
    A_out = ()
    B_out = ()
    O_out = ()
    A_rest = ()
    B_rest = ()
    mantissa = ()
    mantissa_low = ()
    exponent = ()
    for p in tl.static_range(P):
        r, r_low, r_exponent = R[p], R[P + p], R[2 * P + p]
        unit = O_tile[p] + r_exponent
        top = tl.maximum(O[p] + exponent_above(B[p]), unit + exponent_above(B_tile[p]))
        past = pow2(O[p] - top)
        share = r * pow2(unit - top)
        a, a_rest = add(A[p] * past, tl.fma(A_tile[p], share, rest[p] * past))
        b, b_rest = add(B[p] * past, tl.fma(B_tile[p], share, rest[P + p] * past))
        A_out += (a,)
        B_out += (b,)
        O_out += (top,)
        A_rest += (a_rest,)
        B_rest += (b_rest,)
        r, r_low = carry(r, r_low * tile_decay[p], tile_decay[p], tile_decay_low[p])
        is_small = r < 0.5
        scale = tl.where(is_small, 2.0, 1.0)
        mantissa += (r * scale,)
        mantissa_low += (r_low * scale,)
        exponent += (r_exponent + tl.where(is_small, tile_exponent[p] - 1.0, tile_exponent[p]),)
    return A_out, B_out, O_out, A_rest + B_rest, mantissa + mantissa_low + exponent


@triton.jit
def add(x, y):
    """x + y, and what rounding took from it if |x| >= |y|."""
    total = x + y
    return total, (x - total) + y
