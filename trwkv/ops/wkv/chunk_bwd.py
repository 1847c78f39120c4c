"""Backward of the chunked WKV. The adjoint of the state walks from the last tile to the first.

Adjoints are (a, b, O): the derivatives by the true sums are a * 2^-O and b * 2^-O, where O is the exponent of the
forward state at the same position. There a and b are bounded by the sum of |grad| over the tokens that follow.

1. `wkv_chunk_adjoint_kernel` (chunk_adjoint.py): what each chunk's outputs add to the adjoint at its start.
2. `wkv_chunk_bwd_scan_kernel` (chunk_scan.py): the adjoint at the start of each chunk.
3. `wkv_chunk_bwd_kernel`: the gradients. With a single chunk it is the only one that runs.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.chunk_bwd_tiles import store_entered, walk_tile_back
from trwkv.ops.wkv.chunk_fwd import walk_tile
from trwkv.ops.wkv.kernel_math import (
    fast_vectors,
    load_row,
    load_triple,
    load_vectors,
    put_away,
    scale_exactly,
    store_triple,
    user_exponent,
    zeros,
)
from trwkv.ops.wkv.kernel_rows import first_slot, locate_chunk
from trwkv.ops.wkv.kernel_tiles import no_tile, prefetch_rows, tile_source
from trwkv.ops.wkv.kernel_unit import enter_tile, exponents


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


@triton.jit(do_not_specialize=["rows", "T", "chunk_len", "n_chunks", "n_sequences", "slots"])
def wkv_chunk_bwd_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [rows, C]: B T rows, or those of all packed sequences
    v,  # [rows, C]
    weights,  # [P, C] or [rows, P GROUPS]
    cu_seqlens,  # [N + 1] if VARLEN
    grad_output,  # [rows, P, C] or [rows, C / GROUPS]
    grad_final_state,  # [N, 3, P, C]
    states,  # [slots, 3, P, C]: before every segment, and after the last; see kernel_rows
    adjoints,  # [programs along T, 3, P, C]: at the start of each chunk, that of the first is an output
    scratch,  # [programs, SEGMENT / BLOCK_T, 3, P, BLOCK_C] and, after each program's, [3 P + 1, BLOCK_C]
    grad_k,  # [rows, C]
    grad_v,  # [rows, C]
    grad_weights,  # [n_blocks, rows, P]: this block of channels' share
    grad_vectors,  # [programs along T, 3, P, C]: this chunk's share of the gradients of w, u and weights
    rows,
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
    GROUPS: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = SEGMENT // BLOCK_T
    tl.static_assert(tiles <= 32, "a bit for each")
    STEP: tl.constexpr = -1 if REVERSE else 1
    OUTPUTS: tl.constexpr = P if WEIGHTS == "none" else 1
    WIDTH: tl.constexpr = OUTPUTS * C // GROUPS  # of a row of grad_output
    i_c = tl.program_id(0) % n_blocks
    index = tl.program_id(0) // n_blocks
    lane = tl.arange(0, BLOCK_C)
    c0 = i_c * BLOCK_C
    c = c0 + lane
    i_s, first, length, row0, begin, end = locate_chunk(
        cu_seqlens, index, T, chunk_len, n_chunks, n_sequences, VARLEN, SINGLE, REVERSE
    )
    if VARLEN:
        if begin >= length:  # of an empty sequence, or no chunk at all
            return
    p_states = states + first_slot(i_s, first, SEGMENT, slots, VARLEN, 2) * (3 * P * C)
    p_adjoint = adjoints + index.to(tl.int64) * (3 * P * C)
    p_scratch = scratch + tl.program_id(0).to(tl.int64) * ((3 * P * (tiles + 1) + 1) * BLOCK_C)
    if GROUPS > 1:
        group = c0 // (C // GROUPS)
        grad_output -= group * (C // GROUPS)
        if WEIGHTS == "token":
            weights += group
    if WEIGHTS == "token":
        grad_weights += i_c.to(tl.int64) * rows * P

    vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
    fast = fast_vectors(vectors, P, BLOCK_T)
    fast = put_away(fast, p_scratch + tiles * 3 * P * BLOCK_C, P, BLOCK_C)
    tl.debug_barrier()  # what is in scratch may be read by other lanes than wrote it
    p_final = grad_final_state
    if HAS_FINAL:
        p_final += i_s * (3 * P * C)
    p_end = p_states + ((end + SEGMENT - 1) // SEGMENT).to(tl.int64) * (3 * P * C)
    if end == length:
        a, b, O = load_last_adjoint(p_end, p_final, c, C, P, BLOCK_C, HAS_FINAL)
    else:
        a, b, O = load_triple(p_adjoint + 3 * P * C, c, C, P, BLOCK_C)
    is_joint = begin > end
    rest = zeros(2 * P, BLOCK_C)
    p_vectors = grad_vectors + index.to(tl.int64) * (3 * P * C)
    none = zeros(P, BLOCK_C)
    store_triple(p_vectors, c, none, none, none, C, P, BLOCK_C)
    tl.debug_barrier()

    source = tile_source(k, v, c0, c, BLOCK_C, PAIRED)
    n_segments = (end - begin + SEGMENT - 1) // SEGMENT
    for i_s in range(n_segments):
        segment = begin + (n_segments - 1 - i_s) * SEGMENT
        stop = tl.minimum(segment + SEGMENT, end)
        n_tiles = (stop - segment + BLOCK_T - 1) // BLOCK_T
        # The whole segment, and no more: those of all programs are to fit the cache.
        prefetch_rows(k, row0, segment, stop - 1, c0, C, C, BLOCK_C, SEGMENT, STEP, PTX)
        prefetch_rows(v, row0, segment, stop - 1, c0, C, C, BLOCK_C, SEGMENT, STEP, PTX)
        for p in tl.static_range(OUTPUTS):
            prefetch_rows(
                grad_output + p * C, row0, segment, stop - 1, c0, WIDTH, C, BLOCK_C, SEGMENT, STEP, PTX
            )
        A, B, O_state = load_triple(
            p_states + (segment // SEGMENT).to(tl.int64) * (3 * P * C), c, C, P, BLOCK_C
        )
        state_rest = zeros(2 * P, BLOCK_C)
        tile = no_tile(source, BLOCK_T)
        is_fast = begin > end
        fast_tiles = 0  # a bit for each
        for i in range(n_tiles):
            t0 = segment + i * BLOCK_T
            A, B, O_state, state_rest, bound, is_joint_state, tile = walk_tile(
                A, B, O_state, state_rest, is_fast, fast, tile, source, w, u, k, v, weights, (grad_k, None), 0, row0,
                t0 - BLOCK_T, segment, stop, c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, "only", "none", PAIRED, PTX,
            )  # fmt: skip
            A, B, O_state, state_rest, is_fast = enter_tile(
                A, B, O_state, state_rest, bound, is_joint_state, tile[0], t0 + BLOCK_T <= stop, fast,
                P, BLOCK_T, PAIRED, PTX,
            )  # fmt: skip
            fast_tiles |= is_fast.to(tl.int32) << i
            store_entered(p_scratch + i * (3 * P * BLOCK_C), lane, A, B, O_state, is_fast, P, BLOCK_C)
        tl.debug_barrier()
        for i in range(n_tiles):
            at = n_tiles - 1 - i
            is_fast = (fast_tiles >> at) & 1 == 1
            a, b, O, rest = walk_tile_back(
                a, b, O, rest, is_joint, is_fast,
                p_scratch + at * (3 * P * BLOCK_C), fast, source, w, u, k, v, weights, grad_output,
                grad_k, grad_v, grad_weights, p_vectors, row0, segment + at * BLOCK_T, stop, c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, PAIRED, PTX,
            )  # fmt: skip
            is_joint = is_fast
        tl.debug_barrier()

    O = exponents(O, is_joint, P)
    if begin == 0:
        store_triple(p_adjoint, c, a, b, O, C, P, BLOCK_C)
