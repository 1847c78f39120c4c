"""Backward of the chunked WKV. The adjoint of the state walks from the last tile to the first.

Adjoints are (a, b, O): the derivatives by the true sums are a * 2^-O and b * 2^-O, where O is the exponent of the
forward state at the same position. There a and b are bounded by the sum of |grad| over the tokens that follow.

1. `wkv_chunk_bwd_kernel` with GRADS=False: what each chunk's outputs add to the adjoint at its start.
2. `wkv_chunk_bwd_scan_kernel`: the adjoint at the start of each chunk.
3. `wkv_chunk_bwd_kernel` with GRADS=True: the gradients. With a single chunk it is the only one that runs.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.chunk_fwd import load_weights, tile_stabiliser, walk_tile
from trwkv.ops.wkv.kernel_math import (
    EMPTY,
    exact_output,
    exact_update,
    load_row,
    load_triple,
    load_vectors,
    pow2,
    reciprocal,
    scale_exactly,
    split_k,
    split_log,
    store_row,
    store_triple,
    user_exponent,
)


@triton.jit
def load_grad_y(
    grad_output,
    weights,
    row,
    c,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Gradient of each perspective's y at one token, and that of the aggregated output (zero when there is none)."""
    out = ()
    g = tl.zeros([BLOCK_C], tl.float32)
    if WEIGHTS == "none":
        for p in tl.static_range(P):
            out += (load_row(grad_output + (row * P + p) * C, c, C, BLOCK_C, 0.0).to(tl.float32),)
    else:
        g = load_row(grad_output + row * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        weight = load_weights(weights, row, c, C, P, BLOCK_C, WEIGHTS)
        for p in tl.static_range(P):
            out += (g * weight[p],)
    return out, g


@triton.jit
def store_token_grads(
    grad_k, grad_v, grad_weights, row, c, e, v, from_num, from_den, g, y,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dv = e N', dk = e (v N' + D') with N', D' the adjoints of this token's own terms, summed over perspectives."""
    store_row(grad_v + row * C, c, e * from_num, C, BLOCK_C)
    store_row(grad_k + row * C, c, e * tl.fma(v, from_num, from_den), C, BLOCK_C)
    if WEIGHTS == "token":
        for p in tl.static_range(P):
            tl.store(grad_weights + row * P + p, tl.sum(g * y[p], 0))


@triton.jit
def fast_tile_bwd(
    a, b, O, dw, du, dweights, A, B, A_exponent, top, k_rows, v_rows, vectors, weights, grad_output,
    grad_k, grad_v, grad_weights, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Recomputes the tile's states with the forward's arithmetic, keeps them in registers and walks back."""
    decay, decay_exponent, defect, bonus, bonus_exponent = vectors
    W = ()
    first = ()  # what the first step of a tile adds to the decay
    U = ()
    A_rows = ()  # entry j * P + p: before token j
    B_rows = ()
    a_row = ()
    b_row = ()
    dw_tile = ()
    for p in tl.static_range(P):
        W += (decay[p] * pow2(decay_exponent[p]),)
        first += (defect[p] * pow2(decay_exponent[p]),)
        U += (bonus[p] * pow2(bonus_exponent[p]),)
        A_rows += (A[p] * pow2(A_exponent[p] - top),)
        B_rows += (B[p] * pow2(A_exponent[p] - top),)
        a_row += (a[p] * pow2(top - O[p]),)
        b_row += (b[p] * pow2(top - O[p]),)
        dw_tile += (tl.zeros([BLOCK_C], tl.float32),)
    a = a_row
    b = b_row
    e_rows = ()
    for j in tl.static_range(BLOCK_T):
        mantissa, exponent = split_k(k_rows[j].to(tl.float32))
        e_rows += (mantissa * pow2(exponent - top),)
        if j + 1 < BLOCK_T:
            ev = e_rows[j] * v_rows[j].to(tl.float32)
            for p in tl.static_range(P):
                if j == 0:
                    A_rows += (tl.fma(A_rows[p], W[p], tl.fma(A_rows[p], first[p], ev)),)
                    B_rows += (tl.fma(B_rows[p], W[p], tl.fma(B_rows[p], first[p], e_rows[0])),)
                else:
                    A_rows += (tl.fma(A_rows[j * P + p], W[p], ev),)
                    B_rows += (tl.fma(B_rows[j * P + p], W[p], e_rows[j]),)
    for j in tl.static_range(BLOCK_T - 1, -1, -1):
        e = e_rows[j]
        j_v = v_rows[j].to(tl.float32)
        grad_y, g = load_grad_y(grad_output, weights, row + j, c, C, P, BLOCK_C, WEIGHTS)
        from_num = tl.zeros([BLOCK_C], tl.float32)
        from_den = tl.zeros([BLOCK_C], tl.float32)
        y = ()
        a_next = ()
        b_next = ()
        du_next = ()
        dw_next = ()
        dweights_next = ()
        for p in tl.static_range(P):
            j_A = A_rows[j * P + p]
            j_B = B_rows[j * P + p]
            now = U[p] * e
            inverse = reciprocal(j_B + now, APPROX)
            y += (tl.fma(now, j_v, j_A) * inverse,)
            grad_num = grad_y[p] * inverse
            grad_den = -grad_num * y[p]
            if GRADS:
                from_num += tl.fma(U[p], grad_num, a[p])
                from_den += tl.fma(U[p], grad_den, b[p])
                du_next += (tl.fma(now, tl.fma(j_v, grad_num, grad_den), du[p]),)
                dw_next += (tl.fma(a[p], j_A, tl.fma(b[p], j_B, dw_tile[p])),)
                dweights_next += (tl.fma(g, y[p], dweights[p]),)
            if j == 0:
                a_next += (tl.fma(W[p], a[p], tl.fma(first[p], a[p], grad_num)),)
                b_next += (tl.fma(W[p], b[p], tl.fma(first[p], b[p], grad_den)),)
            else:
                a_next += (tl.fma(W[p], a[p], grad_num),)
                b_next += (tl.fma(W[p], b[p], grad_den),)
        a = a_next
        b = b_next
        if GRADS:
            du = du_next
            dw_tile = dw_next
            dweights = dweights_next
            store_token_grads(
                grad_k,
                grad_v,
                grad_weights,
                row + j,
                c,
                e,
                j_v,
                from_num,
                from_den,
                g,
                y,
                C,
                P,
                BLOCK_C,
                WEIGHTS,
            )
    O_begin = ()
    dw_next = ()
    for p in tl.static_range(P):
        O_begin += (top,)
        dw_next += (tl.fma(W[p], dw_tile[p], dw[p]),)
    return a, b, O_begin, dw_next, du, dweights


@triton.jit
def exact_token_bwd(
    a, b, O, dw, du, dweights, A, B, A_exponent, e, k_exponent, v, grad_y, g,
    decay, defect, decay_exponent, bonus, bonus_exponent, is_first, P: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One token back, whatever the exponents: no factor 2^n below has n > 1."""
    from_num = tl.zeros_like(e)
    from_den = tl.zeros_like(e)
    y = ()
    a_next = ()
    b_next = ()
    O_next = ()
    dw_next = ()
    du_next = ()
    dweights_next = ()
    for p in tl.static_range(P):
        num, den, top = exact_output(A[p], B[p], A_exponent[p], bonus[p], bonus_exponent[p], e, k_exponent, v)
        inverse = reciprocal(den, APPROX)
        y += (num * inverse,)
        grad_num = grad_y[p] * inverse
        grad_den = -grad_num * y[p]
        own = bonus[p] * pow2(k_exponent + bonus_exponent[p] - top)
        later = pow2(k_exponent - O[p])
        from_num += tl.fma(own, grad_num, later * a[p])
        from_den += tl.fma(own, grad_den, later * b[p])
        du_next += (tl.fma(own * e, tl.fma(v, grad_num, grad_den), du[p]),)
        dweights_next += (tl.fma(g, y[p], dweights[p]),)
        kept = decay[p] * pow2(A_exponent[p] + decay_exponent[p] - O[p])
        dw_next += (tl.fma(kept, tl.fma(a[p], A[p], b[p] * B[p]), dw[p]),)
        # An empty state has no exponent of its own: take the largest that keeps both factors below within 1.
        before = tl.where(A_exponent[p] == EMPTY, tl.minimum(top, O[p] - decay_exponent[p]), A_exponent[p])
        now = pow2(before - top)
        scale = pow2(before + decay_exponent[p] - O[p])
        kept = decay[p] * scale
        first = tl.where(is_first, defect[p], 0.0) * scale
        a_next += (tl.fma(kept, a[p], tl.fma(first, a[p], now * grad_num)),)
        b_next += (tl.fma(kept, b[p], tl.fma(first, b[p], now * grad_den)),)
        O_next += (before,)
    return a_next, b_next, O_next, dw_next, du_next, dweights_next, from_num, from_den, y


@triton.jit
def exact_tile_bwd(
    a, b, O, dw, du, dweights, A0, B0, O0, vectors, k, v, weights, grad_output,
    grad_k, grad_v, grad_weights, row, steps, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Any data, up to BLOCK_T tokens: before each token the state is computed anew from the tile's start."""
    decay, decay_exponent, defect, bonus, bonus_exponent = vectors
    is_full = steps == BLOCK_T
    for i in range(steps):
        at = steps - 1 - i
        A = A0
        B = B0
        A_exponent = O0
        for m in range(at):
            m_e, m_exponent = split_k(load_row(k + (row + m) * C, c, C, BLOCK_C, 0.0).to(tl.float32))
            m_v = load_row(v + (row + m) * C, c, C, BLOCK_C, 0.0).to(tl.float32)
            A_next = ()
            B_next = ()
            O_next = ()
            for p in tl.static_range(P):
                x, y, z = exact_update(
                    A[p],
                    B[p],
                    A_exponent[p],
                    decay[p],
                    tl.where((m == 0) & is_full, defect[p], 0.0),
                    decay_exponent[p],
                    m_e,
                    m_exponent,
                    m_v,
                )
                A_next += (x,)
                B_next += (y,)
                O_next += (z,)
            A = A_next
            B = B_next
            A_exponent = O_next
        e, exponent = split_k(load_row(k + (row + at) * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + (row + at) * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        grad_y, g = load_grad_y(grad_output, weights, row + at, c, C, P, BLOCK_C, WEIGHTS)
        a, b, O, dw, du, dweights, from_num, from_den, rows_y = exact_token_bwd(
            a, b, O, dw, du, dweights, A, B, A_exponent, e, exponent, i_v, grad_y, g,
            decay, defect, decay_exponent, bonus, bonus_exponent, (at == 0) & is_full, P, APPROX,
        )  # fmt: skip
        if GRADS:
            store_token_grads(
                grad_k, grad_v, grad_weights, row + at, c, e, i_v, from_num, from_den, g, rows_y,
                C, P, BLOCK_C, WEIGHTS,
            )  # fmt: skip
    return a, b, O, dw, du, dweights


@triton.jit
def walk_tile_back(
    a, b, O, dw, du, dweights, A, B, A_exponent, vectors, k, v, weights, grad_output,
    grad_k, grad_v, grad_weights, row0, t0, end, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    WEIGHTS: tl.constexpr, GRADS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Adjoint before token t0 from that after the tile, whose first state is (A, B, A_exponent)."""
    row = row0 + t0
    k_rows = ()
    v_rows = ()
    is_full = t0 + BLOCK_T <= end
    last = end - 1 - t0
    for j in tl.static_range(BLOCK_T):
        j_row = row + tl.minimum(j, last)
        k_rows += (load_row(k + j_row * C, c, C, BLOCK_C, 0.0),)
        v_rows += (load_row(v + j_row * C, c, C, BLOCK_C, 0.0),)
    top, is_safe = tile_stabiliser(k_rows, A_exponent, vectors, P, BLOCK_T)
    if is_safe & is_full:
        a, b, O, dw, du, dweights = fast_tile_bwd(
            a, b, O, dw, du, dweights, A, B, A_exponent, top, k_rows, v_rows, vectors, weights, grad_output,
            grad_k, grad_v, grad_weights, row, c, C, P, BLOCK_C, BLOCK_T, WEIGHTS, GRADS, APPROX,
        )  # fmt: skip
    else:
        a, b, O, dw, du, dweights = exact_tile_bwd(
            a, b, O, dw, du, dweights, A, B, A_exponent, vectors, k, v, weights, grad_output,
            grad_k, grad_v, grad_weights, row, tl.minimum(BLOCK_T, end - t0), c,
            C, P, BLOCK_C, BLOCK_T, WEIGHTS, GRADS, APPROX,
        )  # fmt: skip
    return a, b, O, dw, du, dweights


@triton.jit
def load_last_adjoint(
    states_end,
    grad_final_state,
    c,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    """Adjoint after the chunk from outside it: that of the final state, if any; its exponent is the state's."""
    _, _, O = load_triple(states_end, c, C, P, BLOCK_C)
    a = ()
    b = ()
    for p in tl.static_range(P):
        if HAS_FINAL:
            _, scale = user_exponent(O[p])
            a += (scale_exactly(load_row(grad_final_state + p * C, c, C, BLOCK_C, 0.0), scale),)
            b += (scale_exactly(load_row(grad_final_state + (P + p) * C, c, C, BLOCK_C, 0.0), scale),)
        else:
            a += (tl.zeros([BLOCK_C], tl.float32),)
            b += (tl.zeros([BLOCK_C], tl.float32),)
    return a, b, O


@triton.jit
def wkv_chunk_bwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [B, T, C]
    v,  # [B, T, C]
    weights,  # [P, C] or [B, T, P]
    grad_output,  # [B, T, P, C] or [B, T, C]
    grad_final_state,  # [B, 3, P, C]
    states,  # [B, slots, 3, P, C]: before every segment, and after the last
    adjoints,  # [B, n_chunks, 3, P, C]: at the start of each chunk
    scratch,  # [programs, SEGMENT / BLOCK_T, 3, P, BLOCK_C]
    grad_k,  # [B, T, C]
    grad_v,  # [B, T, C]
    grad_weights,  # [n_blocks, B, T, P]: this block of channels' share
    grad_vectors,  # [B, n_chunks, 3, P, C]: this chunk's share of the gradients of w, u and weights
    T,
    chunk_len,
    n_chunks,
    slots,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SEGMENT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    GRADS: tl.constexpr,
    APPROX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = SEGMENT // BLOCK_T
    i_c = tl.program_id(0) % n_blocks
    i_n = (tl.program_id(0) // n_blocks) % n_chunks
    i_b = (tl.program_id(0) // n_blocks // n_chunks).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = i_c * BLOCK_C + lane
    row0 = i_b * T
    begin = i_n * chunk_len
    end = tl.minimum(begin + chunk_len, T)
    p_states = states + i_b * slots * (3 * P * C)
    p_adjoint = adjoints + (i_b * n_chunks + i_n) * (3 * P * C)
    p_scratch = scratch + tl.program_id(0).to(tl.int64) * (tiles * 3 * P * BLOCK_C)
    if WEIGHTS == "token":
        grad_weights += i_c.to(tl.int64) * (tl.num_programs(0) // n_blocks // n_chunks) * T * P

    vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
    p_final = grad_final_state
    if HAS_FINAL:
        p_final += i_b * (3 * P * C)
    if i_n == n_chunks - 1:
        a, b, O = load_last_adjoint(
            p_states + (slots - 1).to(tl.int64) * (3 * P * C), p_final, c, C, P, BLOCK_C, HAS_FINAL
        )
    elif GRADS:
        a, b, O = load_triple(p_adjoint + 3 * P * C, c, C, P, BLOCK_C)
    else:
        a, b, O = load_last_adjoint(
            p_states + (end // SEGMENT).to(tl.int64) * (3 * P * C), p_final, c, C, P, BLOCK_C, False
        )
    dw = ()
    du = ()
    dweights = ()
    for _ in tl.static_range(P):
        dw += (tl.zeros([BLOCK_C], tl.float32),)
        du += (tl.zeros([BLOCK_C], tl.float32),)
        dweights += (tl.zeros([BLOCK_C], tl.float32),)

    n_segments = (end - begin + SEGMENT - 1) // SEGMENT
    for i_s in range(n_segments):
        segment = begin + (n_segments - 1 - i_s) * SEGMENT
        stop = tl.minimum(segment + SEGMENT, end)
        n_tiles = (stop - segment + BLOCK_T - 1) // BLOCK_T
        A, B, A_exponent = load_triple(
            p_states + (segment // SEGMENT).to(tl.int64) * (3 * P * C), c, C, P, BLOCK_C
        )
        for i in range(n_tiles):
            store_triple(p_scratch + i * (3 * P * BLOCK_C), lane, A, B, A_exponent, BLOCK_C, P, BLOCK_C)
            if i + 1 < n_tiles:
                A, B, A_exponent = walk_tile(
                    A, B, A_exponent, vectors, k, v, weights, grad_k, row0, segment + i * BLOCK_T, stop, c,
                    C, P, BLOCK_C, BLOCK_T, WEIGHTS, False, APPROX,
                )  # fmt: skip
        tl.debug_barrier()  # the scratch rows are read back by other lanes if the compiler lays them out otherwise
        for i in range(n_tiles):
            tile = n_tiles - 1 - i
            A, B, A_exponent = load_triple(p_scratch + tile * (3 * P * BLOCK_C), lane, BLOCK_C, P, BLOCK_C)
            a, b, O, dw, du, dweights = walk_tile_back(
                a, b, O, dw, du, dweights, A, B, A_exponent, vectors, k, v, weights, grad_output,
                grad_k, grad_v, grad_weights, row0, segment + tile * BLOCK_T, stop, c,
                C, P, BLOCK_C, BLOCK_T, WEIGHTS, GRADS, APPROX,
            )  # fmt: skip
        tl.debug_barrier()

    if GRADS:
        p_vectors = grad_vectors + (i_b * n_chunks + i_n) * (3 * P * C)
        store_triple(p_vectors, c, dw, du, dweights, C, P, BLOCK_C)
        if i_n == 0:
            store_triple(p_adjoint, c, a, b, O, C, P, BLOCK_C)
    else:
        store_triple(p_adjoint, c, a, b, O, C, P, BLOCK_C)


@triton.jit
def wkv_chunk_bwd_scan_kernel(
    w,  # [P, C]
    adjoints,  # [B, n_chunks, 3, P, C]: what each chunk adds to the adjoint at its start; replaced by the adjoint
    chunk_len,
    n_chunks,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    decay = ()
    decay_exponent = ()
    for p in tl.static_range(P):
        mantissa, exponent = split_log(load_row(w + p * C, c, C, BLOCK_C, 0.0), chunk_len.to(tl.float64))
        decay += (mantissa.to(tl.float32),)
        decay_exponent += (exponent,)
    p_slot = adjoints + (i_b * n_chunks + n_chunks - 1) * (3 * P * C)
    a, b, O = load_triple(p_slot, c, C, P, BLOCK_C)
    for _ in range(2, n_chunks):
        p_slot -= 3 * P * C
        a_chunk, b_chunk, O_chunk = load_triple(p_slot, c, C, P, BLOCK_C)
        a_next = ()
        b_next = ()
        for p in tl.static_range(P):
            kept = decay[p] * pow2(O_chunk[p] + decay_exponent[p] - O[p])
            a_next += (tl.fma(a[p], kept, a_chunk[p]),)
            b_next += (tl.fma(b[p], kept, b_chunk[p]),)
        a = a_next
        b = b_next
        O = O_chunk
        store_triple(p_slot, c, a, b, O, C, P, BLOCK_C)
