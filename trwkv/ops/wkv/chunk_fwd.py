"""Forward of the chunked WKV: three kernels. A chunk is walked tile by tile, BLOCK_T tokens at a time.

1. `wkv_chunk_sums_kernel` (chunk_sums.py): what each chunk adds to an empty state.
2. `wkv_chunk_scan_kernel` (chunk_scan.py): the state before each chunk.
3. `wkv_chunk_fwd_kernel`: the outputs. With a single chunk it is the only one that runs.
   k and v of one perspective each come as one perspective of GROUPS times as many channels. Their weighted sum then
   takes a launch for each group, GROUP "first", "middle" or "last" ("only": there is one): it adds to the sum so far.
   With OUTPUT="states" it stores the state before every token instead, by the exact path alone: the fast one may lose
   a state that its tile's tokens outweigh.

A tile's states follow from each other token by token. The next tile's first one does not: it is this tile's, decayed by
the whole tile, plus what joined since, summed apart. `rest` is what rounding took from it, 2 P numbers (of A, then of
B) that join the next tile's sum: a slow decay would lose the same amount again and again.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    carry,
    empty_state,
    exact_carry,
    exact_output,
    exact_update,
    exp_near,
    exponent_above,
    fast_vectors,
    load_decay,
    load_row,
    load_triple,
    load_user_state,
    load_vectors,
    reciprocal,
    split_k,
    store_triple,
    store_user_state,
    taken,
    zeros,
)
from trwkv.ops.wkv.kernel_outputs import (
    channel_weights,
    gated,
    of_token,
    store_output,
    store_token_state,
    sum_so_far,
    token_weights,
    weights_of_tokens,
)
from trwkv.ops.wkv.kernel_rows import first_slot, locate_chunk
from trwkv.ops.wkv.kernel_tiles import load_rows, load_tile, no_tile, prefetch_rows, tile_source, widen
from trwkv.ops.wkv.kernel_unit import enter_tile, join, split


@triton.jit(do_not_specialize=["group", "plane", "T", "chunk_len", "n_chunks", "n_sequences", "slots"])
def wkv_chunk_fwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [rows, C]: B T rows, or those of all packed sequences
    v,  # [rows, C]
    weights,  # [P, C] or [rows, P GROUPS]
    initial_state,  # [N, 3, P, C], N sequences, as the user has it
    cu_seqlens,  # [N + 1] if VARLEN
    chunks,  # [programs along T, 3, P, C] unless SINGLE: the state before each chunk
    states,  # [slots, 3, P, C] if SAVE: before every segment, and after the last; see kernel_rows
    final_state,  # [N, 3, P, C], as the user sees it
    output,  # [rows, P, C], [rows, C / GROUPS], or states [3, rows, P, C]
    partial,  # [rows, C / GROUPS], float32: the sum of the groups so far
    group,
    plane,  # rows P C
    T,
    chunk_len,
    n_chunks,
    n_sequences,
    slots,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SEGMENT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C // GROUPS + BLOCK_C - 1) // BLOCK_C
    STEP: tl.constexpr = -1 if REVERSE else 1
    c0 = (tl.program_id(0) % n_blocks) * BLOCK_C
    if GROUPS > 1:
        first_channel = group * (C // GROUPS)
        c0 += first_channel
        output -= first_channel
        partial -= first_channel
        if WEIGHTS == "token":
            weights += group
    sums = (output, partial)
    c = c0 + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // n_blocks
    i_s, first, length, row0, begin, end = locate_chunk(
        cu_seqlens, index, T, chunk_len, n_chunks, n_sequences, VARLEN, SINGLE, REVERSE
    )
    if VARLEN:
        if begin >= length:  # of an empty sequence, or no chunk at all
            return
    if SAVE:
        p_states = states + first_slot(i_s, first, SEGMENT, slots, VARLEN, 2) * (3 * P * C)

    vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
    fast = fast_vectors(vectors, P, BLOCK_T)
    if not SINGLE:
        A, B, O = load_triple(chunks + index.to(tl.int64) * (3 * P * C), c, C, P, BLOCK_C)
    elif HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_s * (3 * P * C), c, C, P, BLOCK_C)
    else:
        A, B, O = empty_state(P, BLOCK_C)
    rest = zeros(2 * P, BLOCK_C)

    if OUTPUT == "states":
        for t0 in range(begin, end, BLOCK_T):
            A, B, O, rest = exact_tile(
                A, B, O, rest, vectors, w, k, v, weights, None, sums, plane, row0 + t0 * STEP,
                tl.minimum(BLOCK_T, end - t0), c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, GROUP, OUTPUT, False, PTX,
            )  # fmt: skip
    else:
        source = tile_source(k, v, c0, c, BLOCK_C, PAIRED)
        tile = no_tile(source, BLOCK_T)
        is_fast = begin > end  # nor does the tile before the first do anything but load it
        for t0 in range(begin - BLOCK_T, end, BLOCK_T):
            # The next tile is loaded in this one's time: too short where warps are few.
            prefetch_rows(k, row0, t0 + 2 * BLOCK_T, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
            prefetch_rows(v, row0, t0 + 2 * BLOCK_T, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
            A, B, O, rest, bound, is_joint, tile = walk_tile(
                A, B, O, rest, is_fast, fast, tile, source, w, u, k, v, weights, sums, plane, row0, t0, begin, end, c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, GROUP, OUTPUT, PAIRED, PTX,
            )  # fmt: skip
            t1 = t0 + BLOCK_T
            if SAVE:
                if (t1 % SEGMENT == 0) & (t1 < end):
                    p_saved = p_states + (t1 // SEGMENT).to(tl.int64) * (3 * P * C)
                    A_saved, B_saved, O_saved, _ = split(A, B, O, rest, is_joint, P)
                    store_triple(p_saved, c, A_saved, B_saved, O_saved, C, P, BLOCK_C)
            A, B, O, rest, is_fast = enter_tile(
                A, B, O, rest, bound, is_joint, tile[0], t1 + BLOCK_T <= end, fast, P, BLOCK_T, PAIRED, PTX
            )

    if end == length:
        store_user_state(final_state + i_s * (3 * P * C), c, A, B, O, C, P, BLOCK_C)
        if SAVE:
            p_last = p_states + ((length + SEGMENT - 1) // SEGMENT).to(tl.int64) * (3 * P * C)
            store_triple(p_last, c, A, B, O, C, P, BLOCK_C)


@triton.jit
def walk_tile(
    A, B, O, rest, is_fast, fast, tile, source, w, u, k, v, weights, output, plane, row0, t0, begin, end, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, OUTPUT: tl.constexpr,
    PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """From the state that `enter_tile` has prepared for tokens t0 .. min(t0 + BLOCK_T, end) - 1, whose k and v are
    `tile`, to that after them, a bound of it and whether it is joint; their outputs; and the next tile.

    A walk starts a tile before `begin`, only to load its first one.
    """
    row = row0 + t0 * STEP
    missing = tl.maximum(t0 + 2 * BLOCK_T - end, 0)  # tokens that the next tile lacks
    k_rows, v_rows = tile
    if is_fast:
        A, B, O, rest, bound, tile = fast_tile(
            A, B, O, rest, k_rows, v_rows, source, missing, fast, weights, output, row, c,
            C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, GROUP, OUTPUT, PAIRED, PTX,
        )  # fmt: skip
        is_joint = is_fast
    else:
        if t0 >= begin:
            # Anew: the fast path has no registers left for them.
            vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
            A, B, O, rest = exact_tile(
                A, B, O, rest, vectors, w, k, v, weights, None, output, plane, row, tl.minimum(BLOCK_T, end - t0), c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, GROUP, OUTPUT, False, PTX,
            )  # fmt: skip
        A, B, O, rest, bound, is_joint = join(A, B, O, rest, P)
        next_row = row + BLOCK_T * STEP
        tile = no_tile(source, BLOCK_T)  # keeping this one's registers would cost the exact path some
        tile = load_tile(source, next_row, missing, tile, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    return A, B, O, rest, bound, is_joint, tile


@triton.jit
def fast_tile(
    A, B, O, rest, k_rows, v_rows, source, missing, fast, weights, output, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, OUTPUT: tl.constexpr,
    PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One exponent, O[0], for all perspectives and tokens: multiply-adds and a reciprocal per perspective.

    Rows of the next tile are loaded as soon as those of this one are done with, into their registers.
    """
    W, U, tile_W, tile_W_low, _, _ = fast
    of_channels = channel_weights(weights, c, C, P, BLOCK_C, WEIGHTS)
    # Weights before the stores of tokens before, of as many tokens as there are registers for.
    AHEAD: tl.constexpr = BLOCK_T if P <= 3 else min(4, BLOCK_T)
    token_w = weights_of_tokens(weights, of_channels, row, P, AHEAD, STEP, WEIGHTS, GROUPS)
    so_far = sum_so_far(output, row, c, C, BLOCK_C, BLOCK_T, STEP, GROUPS, GROUP)
    top = O[0]
    joined = rest
    A_begin = A
    B_begin = B
    e_rows = ()
    for j in tl.static_range(BLOCK_T):
        e_rows += (exp_near(widen(k_rows[j], PAIRED), top),)
    p_k, p_v, c_tile = source
    next_row = row + BLOCK_T * STEP
    k_rows = load_rows(p_k, next_row, c_tile, missing, k_rows, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    next_v_rows = ()
    for j in tl.static_range(BLOCK_T):
        if j + AHEAD < BLOCK_T:
            token_w += token_weights(weights, of_channels, row + (j + AHEAD) * STEP, P, WEIGHTS, GROUPS)
        e = e_rows[j]
        ev = e * widen(v_rows[j], PAIRED)
        next_v_rows += load_rows(
            p_v, next_row + j * STEP, c_tile, missing, (v_rows[j],), C, BLOCK_C, 1, STEP, PAIRED
        )
        y = ()
        A_next = ()
        B_next = ()
        joined_next = ()
        for p in tl.static_range(P):
            if OUTPUT == "y":
                y += (tl.fma(U[p], ev, A[p]) * reciprocal(tl.fma(U[p], e, B[p]), PTX),)
            A_next += (tl.fma(A[p], W[p], ev),)
            B_next += (tl.fma(B[p], W[p], e),)
            joined_next += (tl.fma(joined[p], W[p], ev),)
        for p in tl.static_range(P):
            joined_next += (tl.fma(joined[P + p], W[p], e),)
        A = A_next
        B = B_next
        joined = joined_next
        if OUTPUT == "y":
            store_output(
                output, so_far[j], row + j * STEP, c, y, of_token(token_w, j, P),
                C, P, BLOCK_C, WEIGHTS, GROUPS, GROUP,
            )  # fmt: skip
    A_end = ()
    B_end = ()
    A_rest = ()
    B_rest = ()
    for p in tl.static_range(P):
        decay = taken(tile_W[p])
        decay_low = taken(tile_W_low[p])
        a, a_rest = carry(A_begin[p], joined[p], decay, decay_low)
        b, b_rest = carry(B_begin[p], joined[P + p], decay, decay_low)
        A_end += (a,)
        B_end += (b,)
        A_rest += (a_rest,)
        B_rest += (b_rest,)
        if p == 0:
            largest = b
        else:
            largest = tl.maximum(largest, b)
    return A_end, B_end, O, A_rest + B_rest, top + exponent_above(largest), (k_rows, next_v_rows)


@triton.jit
def exact_tile(
    A, B, O, rest, vectors, w, k, v, weights, receptance, output, plane, row, steps, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, OUTPUT: tl.constexpr,
    GATED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The same roundings as `fast_tile` with an exponent per perspective and step: any data, up to BLOCK_T tokens.

    GATED: the outputs are multiplied with the sigmoid of `receptance`.
    """
    decay, decay_exponent, tile_decay, tile_decay_low, tile_exponent, bonus, bonus_exponent = vectors
    of_channels = channel_weights(weights, c, C, P, BLOCK_C, WEIGHTS)
    A_begin = A
    B_begin = B
    O_begin = O
    joined = rest
    for i in range(steps):
        i_row = row + i * STEP
        if OUTPUT == "states":
            store_token_state(output[0], plane, i_row, c, A, B, O, C, P, BLOCK_C)
        e, exponent = split_k(load_row(k + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        i_w = token_weights(weights, of_channels, i_row, P, WEIGHTS, GROUPS)
        y = ()
        A_next = ()
        B_next = ()
        O_next = ()
        A_joined = ()
        B_joined = ()
        for p in tl.static_range(P):
            if OUTPUT == "y":
                num, den, _ = exact_output(A[p], B[p], O[p], bonus[p], bonus_exponent[p], e, exponent, i_v)
                y += (num * reciprocal(den, PTX),)
            a, b, o, a_joined, b_joined = exact_update(
                A[p], B[p], O[p], joined[p], joined[P + p], decay[p], decay_exponent[p], e, exponent, i_v
            )
            A_next += (a,)
            B_next += (b,)
            O_next += (o,)
            A_joined += (a_joined,)
            B_joined += (b_joined,)
        A = A_next
        B = B_next
        O = O_next
        joined = A_joined + B_joined
        if GATED:
            y = gated(y, receptance, i_row, c, C, P, BLOCK_C, WEIGHTS, PTX)
        if OUTPUT == "y":
            so_far = sum_so_far(output, i_row, c, C, BLOCK_C, 1, STEP, GROUPS, GROUP)
            store_output(output, so_far[0], i_row, c, y, i_w, C, P, BLOCK_C, WEIGHTS, GROUPS, GROUP)
    if OUTPUT != "none":
        # The last tile: calls of few tokens each would all err alike, by the rounding of decays.
        if steps < BLOCK_T:
            tile_decay, tile_decay_low, tile_exponent = load_decay(w, c, steps.to(tl.float64), C, P, BLOCK_C)
    if OUTPUT != "none" or steps == BLOCK_T:
        A_end = ()
        B_end = ()
        O_end = ()
        A_rest = ()
        B_rest = ()
        for p in tl.static_range(P):
            a, b, o, a_rest, b_rest = exact_carry(
                A_begin[p], B_begin[p], O_begin[p], joined[p], joined[P + p], O[p],
                tile_decay[p], tile_decay_low[p], tile_exponent[p],
            )  # fmt: skip
            A_end += (a,)
            B_end += (b,)
            O_end += (o,)
            A_rest += (a_rest,)
            B_rest += (b_rest,)
        A = A_end
        B = B_end
        O = O_end
        rest = A_rest + B_rest
    return A, B, O, rest
