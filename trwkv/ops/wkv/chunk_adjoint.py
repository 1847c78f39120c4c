"""What each chunk's outputs add to the adjoint of the state at its start: the backward's first walk, token by token
in running order and without a gradient.

For one perspective, with R_t what has become of a unit of A (or of B) at the chunk's start,

    a = sum_t R_t n_t,    b = sum_t R_t d_t,    n_t = g_t / D_t,    d_t = -n_t y_t    (MATH.md, section 3)

so nothing is kept for a way back. R decays as the state does and is held in its exponent, which bounds it by the state:
R_t n_t is at most 2 |g_t| in the exponent of the state at the chunk's start.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.chunk_adjoint_tiles import exact_tile_adjoint, fast_tile_adjoint
from trwkv.ops.wkv.chunk_bwd import load_last_adjoint
from trwkv.ops.wkv.kernel_grads import load_grads
from trwkv.ops.wkv.kernel_math import (
    fast_vectors,
    load_triple,
    load_vectors,
    ones,
    pow2,
    put_away,
    store_triple,
    zeros,
)
from trwkv.ops.wkv.kernel_rows import first_slot, locate_chunk
from trwkv.ops.wkv.kernel_tiles import load_tile, no_rows, no_tile, prefetch_rows, tile_source
from trwkv.ops.wkv.kernel_unit import enter_tile, join, split


@triton.jit(do_not_specialize=["T", "chunk_len", "n_chunks", "n_sequences", "slots"])
def wkv_chunk_adjoint_kernel(
    w,  # [P, C]
    u,  # [P, C]
    k,  # [rows, C]: B T rows, or those of all packed sequences
    v,  # [rows, C]
    weights,  # [P, C] or [rows, P GROUPS]
    cu_seqlens,  # [N + 1] if VARLEN
    grad_output,  # [rows, P, C] or [rows, C / GROUPS]
    grad_final_state,  # [N, 3, P, C]
    states,  # [slots, 3, P, C]: before every segment, and after the last; see kernel_rows
    adjoints,  # [programs along T, 3, P, C]: at the start of each chunk but the first, by its own outputs
    scratch,  # of the size that `wkv_chunk_bwd_kernel` takes
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
    HAS_FINAL: tl.constexpr,
    PAIRED: tl.constexpr,
    PTX: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    STEP: tl.constexpr = -1 if REVERSE else 1
    OUTPUTS: tl.constexpr = P if WEIGHTS == "none" else 1
    WIDTH: tl.constexpr = OUTPUTS * C // GROUPS  # of a row of grad_output
    c0 = (tl.program_id(0) % n_blocks) * BLOCK_C
    index = tl.program_id(0) // n_blocks
    c = c0 + tl.arange(0, BLOCK_C)
    i_s, first, length, row0, begin, end = locate_chunk(
        cu_seqlens, index, T, chunk_len, n_chunks, n_sequences, VARLEN, False, REVERSE
    )
    if (begin == 0) | (begin >= length):  # the first chunk's is found with its gradients; or no chunk at all
        return
    p_states = states + first_slot(i_s, first, SEGMENT, slots, VARLEN, 2) * (3 * P * C)
    p_begin = p_states + (begin // SEGMENT).to(tl.int64) * (3 * P * C)
    if GROUPS > 1:
        group = c0 // (C // GROUPS)
        grad_output -= group * (C // GROUPS)
        if WEIGHTS == "token":
            weights += group

    vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
    fast = fast_vectors(vectors, P, BLOCK_T)
    if P * BLOCK_C > 128:  # where registers are short
        SIZE: tl.constexpr = (3 * P * (SEGMENT // BLOCK_T + 1) + 1) * BLOCK_C  # a program's, as there
        fast = put_away(fast, scratch + tl.program_id(0).to(tl.int64) * SIZE, P, BLOCK_C)
        tl.debug_barrier()  # what is in scratch may be read by other lanes than wrote it
    A, B, O = load_triple(p_begin, c, C, P, BLOCK_C)
    # Which changes nothing; but the fast path would wait for its own loads, if it had to wait for these.
    A, B, O, _ = split(A, B, O, (), False, P)
    rest = zeros(2 * P, BLOCK_C) + ones(P, BLOCK_C) + zeros(P, BLOCK_C)
    a = zeros(P, BLOCK_C)
    b = zeros(P, BLOCK_C)
    source = tile_source(k, v, c0, c, BLOCK_C, PAIRED)
    p_grad = grad_output
    if PAIRED is not None:
        p_grad = grad_output.to(tl.pointer_type(tl.int32), bitcast=True)
    tile = no_tile(source, BLOCK_T)
    grads = no_rows(p_grad, source[2], BLOCK_T * OUTPUTS)
    is_fast = begin > end  # nor does the tile before the first do anything but load it
    for t0 in range(begin - BLOCK_T, end, BLOCK_T):
        prefetch_rows(k, row0, t0 + 2 * BLOCK_T, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
        prefetch_rows(v, row0, t0 + 2 * BLOCK_T, end - 1, c0, C, C, BLOCK_C, BLOCK_T, STEP, PTX)
        for p in tl.static_range(OUTPUTS):
            prefetch_rows(
                grad_output + p * C, row0, t0 + 2 * BLOCK_T, end - 1, c0, WIDTH, C, BLOCK_C, BLOCK_T, STEP, PTX
            )  # fmt: skip
        row = row0 + t0 * STEP
        missing = tl.maximum(t0 + 2 * BLOCK_T - end, 0)  # tokens that the next tile lacks
        if is_fast:
            A, B, O, rest, a, b, bound, tile, grads = fast_tile_adjoint(
                A, B, O, rest, a, b, tile, grads, source, p_grad, missing, fast, weights, row, c,
                C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, PAIRED, PTX,
            )  # fmt: skip
            is_joint = is_fast
        else:
            if t0 >= begin:
                # Anew: the fast path has no registers left for them.
                vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
                A, B, O, rest, a, b = exact_tile_adjoint(
                    A, B, O, rest, a, b, vectors, w, k, v, weights, grad_output, row, tl.minimum(BLOCK_T, end - t0), c,
                    C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, PTX,
                )  # fmt: skip
            A, B, O, rest, bound, is_joint = join(A, B, O, rest, P)
            next_row = row + BLOCK_T * STEP
            tile = no_tile(source, BLOCK_T)
            tile = load_tile(source, next_row, missing, tile, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
            grads = no_rows(p_grad, source[2], BLOCK_T * OUTPUTS)
            grads = load_grads(
                p_grad, next_row, source[2], missing, grads, C, P, BLOCK_T, STEP, WEIGHTS, GROUPS, PAIRED
            )
        A, B, O, rest, is_fast = enter_tile(
            A, B, O, rest, bound, is_joint, tile[0], t0 + 2 * BLOCK_T <= end, fast, P, BLOCK_T, PAIRED, PTX
        )

    if HAS_FINAL:
        if end == length:
            p_end = p_states + ((end + SEGMENT - 1) // SEGMENT).to(tl.int64) * (3 * P * C)
            a, b = add_final(a, b, O, rest, p_end, grad_final_state + i_s * (3 * P * C), c, C, P, BLOCK_C)
    _, _, O_begin = load_triple(p_begin, c, C, P, BLOCK_C)
    store_triple(adjoints + index.to(tl.int64) * (3 * P * C), c, a, b, O_begin, C, P, BLOCK_C)


@triton.jit
def add_final(a, b, O, rest, p_end, p_final, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """What the final state's gradient adds. `p_end`: that state as the forward kept it, which gave it its exponent."""
    a_final, b_final, O_final = load_last_adjoint(p_end, p_final, c, C, P, BLOCK_C, True)
    a_out = ()
    b_out = ()
    for p in tl.static_range(P):
        kept = rest[2 * P + p] * pow2(O[p] - O_final[p])
        a_out += (tl.fma(kept, a_final[p], a[p]),)
        b_out += (tl.fma(kept, b_final[p], b[p]),)
    return a_out, b_out
