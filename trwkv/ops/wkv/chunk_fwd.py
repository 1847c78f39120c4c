"""Forward of the chunked WKV: three kernels. A chunk is walked tile by tile, BLOCK_T tokens at a time.

1. `wkv_chunk_fwd_kernel` with OUTPUT=False: what each chunk adds to an empty state.
2. `wkv_chunk_scan_kernel`: the state before each chunk.
3. `wkv_chunk_fwd_kernel` with OUTPUT=True: the outputs. With a single chunk it is the only one that runs.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    SAFE_BITS,
    empty_state,
    exact_output,
    exact_update,
    load_row,
    load_triple,
    load_user_state,
    load_vectors,
    normalise,
    pow2,
    reciprocal,
    split_k,
    split_log,
    store_row,
    store_triple,
    store_user_state,
)


@triton.jit
def load_weights(
    weights, row, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr
):
    """Aggregation weights of one token (`row` counts tokens over the batch): per channel or per token."""
    out = ()
    for p in tl.static_range(P):
        if WEIGHTS == "channel":
            out += (load_row(weights + p * C, c, C, BLOCK_C, 0.0).to(tl.float32),)
        else:
            out += (tl.load(weights + row * P + p).to(tl.float32),)
    return out


@triton.jit
def store_output(
    output, row, c, y, weights, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr
):
    """y, one [BLOCK_C] per perspective, to output [.., P, C], or its weighted sum to [.., C]."""
    if WEIGHTS == "none":
        for p in tl.static_range(P):
            store_row(output + (row * P + p) * C, c, y[p], C, BLOCK_C)
    else:
        w = load_weights(weights, row, c, C, P, BLOCK_C, WEIGHTS)
        total = w[0] * y[0]
        for p in tl.static_range(1, P):
            total = tl.fma(w[p], y[p], total)
        store_row(output + row * C, c, total, C, BLOCK_C)


@triton.jit
def tile_stabiliser(k_rows, O, vectors, P: tl.constexpr, BLOCK_T: tl.constexpr):
    """The exponent that one tile computes in, and whether every sum in it then stays within SAFE_BITS."""
    k_max = k_rows[0].to(tl.float32)
    k_min = k_max
    for j in tl.static_range(1, BLOCK_T):
        k_max = tl.maximum(k_max, k_rows[j].to(tl.float32))
        k_min = tl.minimum(k_min, k_rows[j].to(tl.float32))
    _, top = split_k(k_max)
    _, bottom = split_k(k_min)
    for p in tl.static_range(P):
        top = tl.maximum(top, O[p])
    _, decay_exponent, _, _, bonus_exponent = vectors
    safe = top == top
    for p in tl.static_range(P):
        tokens = bottom - top + tl.minimum(bonus_exponent[p], 0.0) >= -SAFE_BITS
        lowest = O[p] - top + BLOCK_T * (decay_exponent[p] - 1.0) - 2.0
        carried = lowest >= tl.maximum(bonus_exponent[p], 0.0) - SAFE_BITS
        bounded = (bonus_exponent[p] <= SAFE_BITS) & (BLOCK_T * decay_exponent[p] <= SAFE_BITS)
        safe = safe & bounded & (tokens | carried)
    return top, tl.min(safe.to(tl.int32), 0) > 0


@triton.jit
def wkv_chunk_fwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [B, T, C]
    v,  # [B, T, C]
    weights,  # [P, C] or [B, T, P]
    initial_state,  # [B, 3, P, C], as the user has it
    states,  # [B, slots, 3, P, C], internal form
    final_state,  # [B, 3, P, C], as the user sees it
    output,  # [B, T, P, C] or [B, T, C]
    T,
    chunk_len,
    n_chunks,
    slots,
    slots_per_chunk,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SEGMENT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    APPROX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_c = tl.program_id(0) % n_blocks
    i_n = (tl.program_id(0) // n_blocks) % n_chunks
    i_b = (tl.program_id(0) // n_blocks // n_chunks).to(tl.int64)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    row0 = i_b * T
    p_slot = states + (i_b * slots + i_n * slots_per_chunk) * (3 * P * C)

    vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
    A, B, O = empty_state(P, BLOCK_C)
    if OUTPUT:
        if n_chunks > 1:
            A, B, O = load_triple(p_slot, c, C, P, BLOCK_C)
        elif HAS_INITIAL:
            A, B, O = load_user_state(initial_state + i_b * (3 * P * C), c, C, P, BLOCK_C)

    begin = i_n * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    for t0 in range(begin, end, BLOCK_T):
        if SAVE:
            if t0 % SEGMENT == 0:
                p_saved = states + (i_b * slots + t0 // SEGMENT) * (3 * P * C)
                store_triple(p_saved, c, A, B, O, C, P, BLOCK_C)
        A, B, O = walk_tile(
            A, B, O, vectors, k, v, weights, output, row0, t0, end, c,
            C, P, BLOCK_C, BLOCK_T, WEIGHTS, OUTPUT, APPROX,
        )  # fmt: skip

    if OUTPUT:
        if i_n == n_chunks - 1:
            store_user_state(final_state + i_b * (3 * P * C), c, A, B, O, C, P, BLOCK_C)
            if SAVE:
                store_triple(states + (i_b * slots + slots - 1) * (3 * P * C), c, A, B, O, C, P, BLOCK_C)
    elif i_n < n_chunks - 1:
        store_triple(p_slot + slots_per_chunk * (3 * P * C), c, A, B, O, C, P, BLOCK_C)


@triton.jit
def walk_tile(
    A, B, O, vectors, k, v, weights, output, row0, t0, end, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, OUTPUT: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """The state after tokens t0 .. min(t0 + BLOCK_T, end) - 1, and their outputs."""
    row = row0 + t0
    k_rows = ()
    v_rows = ()
    is_full = t0 + BLOCK_T <= end
    last = end - 1 - t0
    for j in tl.static_range(BLOCK_T):  # rows beyond the end repeat the last one and are not used
        j_row = row + tl.minimum(j, last)
        k_rows += (load_row(k + j_row * C, c, C, BLOCK_C, 0.0),)
        v_rows += (load_row(v + j_row * C, c, C, BLOCK_C, 0.0),)
    top, is_safe = tile_stabiliser(k_rows, O, vectors, P, BLOCK_T)
    if is_safe & is_full:
        A, B, O = fast_tile(
            A, B, O, top, k_rows, v_rows, vectors, weights, output, row, c,
            C, P, BLOCK_C, BLOCK_T, WEIGHTS, OUTPUT, APPROX,
        )  # fmt: skip
    else:
        A, B, O = exact_tile(
            A, B, O, vectors, k, v, weights, output, row, tl.minimum(BLOCK_T, end - t0), c,
            C, P, BLOCK_C, BLOCK_T, WEIGHTS, OUTPUT, APPROX,
        )  # fmt: skip
    return A, B, O


@triton.jit
def fast_tile(
    A, B, O, top, k_rows, v_rows, vectors, weights, output, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, OUTPUT: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One exponent, `top`, for all perspectives and tokens: multiply-adds and a reciprocal per perspective."""
    decay, decay_exponent, defect, bonus, bonus_exponent = vectors
    W = ()
    U = ()
    A_row = ()
    B_row = ()
    for p in tl.static_range(P):
        W += (decay[p] * pow2(decay_exponent[p]),)
        U += (bonus[p] * pow2(bonus_exponent[p]),)
        A_row += (A[p] * pow2(O[p] - top),)
        B_row += (B[p] * pow2(O[p] - top),)
    A = A_row
    B = B_row
    for j in tl.static_range(BLOCK_T):
        mantissa, exponent = split_k(k_rows[j].to(tl.float32))
        e = mantissa * pow2(exponent - top)
        j_v = v_rows[j].to(tl.float32)
        ev = e * j_v
        y = ()
        A_next = ()
        B_next = ()
        for p in tl.static_range(P):
            if OUTPUT:
                now = U[p] * e
                y += (tl.fma(now, j_v, A[p]) * reciprocal(B[p] + now, APPROX),)
            if j == 0:
                first = defect[p] * pow2(decay_exponent[p])
                A_next += (tl.fma(A[p], W[p], tl.fma(A[p], first, ev)),)
                B_next += (tl.fma(B[p], W[p], tl.fma(B[p], first, e)),)
            else:
                A_next += (tl.fma(A[p], W[p], ev),)
                B_next += (tl.fma(B[p], W[p], e),)
        A = A_next
        B = B_next
        if OUTPUT:
            store_output(output, row + j, c, y, weights, C, P, BLOCK_C, WEIGHTS)
    O_end = ()
    A_end = ()
    B_end = ()
    for p in tl.static_range(P):
        a, b, o = normalise(A[p], B[p], top)
        A_end += (a,)
        B_end += (b,)
        O_end += (o,)
    return A_end, B_end, O_end


@triton.jit
def exact_tile(
    A, B, O, vectors, k, v, weights, output, row, steps, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, OUTPUT: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """The same roundings as `fast_tile` with an exponent per perspective and step: any data, up to BLOCK_T tokens."""
    decay, decay_exponent, defect, bonus, bonus_exponent = vectors
    for i in range(steps):
        is_first = (i == 0) & (steps == BLOCK_T)
        e, exponent = split_k(load_row(k + (row + i) * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + (row + i) * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        y = ()
        A_next = ()
        B_next = ()
        O_next = ()
        for p in tl.static_range(P):
            if OUTPUT:
                num, den, _ = exact_output(A[p], B[p], O[p], bonus[p], bonus_exponent[p], e, exponent, i_v)
                y += (num * reciprocal(den, APPROX),)
            a, b, o = exact_update(
                A[p],
                B[p],
                O[p],
                decay[p],
                tl.where(is_first, defect[p], 0.0),
                decay_exponent[p],
                e,
                exponent,
                i_v,
            )
            A_next += (a,)
            B_next += (b,)
            O_next += (o,)
        A = A_next
        B = B_next
        O = O_next
        if OUTPUT:
            store_output(output, row + i, c, y, weights, C, P, BLOCK_C, WEIGHTS)
    return A, B, O


@triton.jit
def wkv_chunk_scan_kernel(
    w,  # [P, C]
    initial_state,  # [B, 3, P, C], as the user has it
    states,  # [B, slots, 3, P, C]: in slot n + 1 what chunk n adds; replaced by the state before chunk n + 1
    chunk_len,
    n_chunks,
    slots,
    slots_per_chunk,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    A, B, O = empty_state(P, BLOCK_C)
    if HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_b * (3 * P * C), c, C, P, BLOCK_C)
    decay = ()
    decay_exponent = ()
    for p in tl.static_range(P):
        mantissa, exponent = split_log(load_row(w + p * C, c, C, BLOCK_C, 0.0), chunk_len.to(tl.float64))
        decay += (mantissa.to(tl.float32),)
        decay_exponent += (exponent,)
    p_slot = states + i_b * slots * (3 * P * C)
    store_triple(p_slot, c, A, B, O, C, P, BLOCK_C)
    for _ in range(1, n_chunks):
        p_slot += slots_per_chunk * (3 * P * C)
        A_chunk, B_chunk, O_chunk = load_triple(p_slot, c, C, P, BLOCK_C)
        A_next = ()
        B_next = ()
        O_next = ()
        for p in tl.static_range(P):
            decayed = O[p] + decay_exponent[p]
            top = tl.maximum(decayed, O_chunk[p])
            past = decay[p] * pow2(decayed - top)
            now = pow2(O_chunk[p] - top)
            a, b, o = normalise(
                tl.fma(A[p], past, A_chunk[p] * now), tl.fma(B[p], past, B_chunk[p] * now), top
            )
            A_next += (a,)
            B_next += (b,)
            O_next += (o,)
        A = A_next
        B = B_next
        O = O_next
        store_triple(p_slot, c, A, B, O, C, P, BLOCK_C)
