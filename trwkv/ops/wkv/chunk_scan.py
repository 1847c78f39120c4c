"""Forward of the chunked WKV, between its two walks: the state before each chunk, from what each chunk adds."""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    empty_state,
    exact_carry,
    load_decay,
    load_triple,
    load_user_state,
    pow2,
    store_triple,
    zeros,
)
from trwkv.ops.wkv.kernel_rows import first_slot, locate_sequence


@triton.jit
def wkv_chunk_scan_kernel(
    w,  # [P, C]
    initial_state,  # [N, 3, P, C], as the user has it
    cu_seqlens,  # [N + 1] if VARLEN
    states,  # [slots, 3, P, C]: where chunk n + 1 begins, what chunk n adds; replaced by the state there
    T,
    chunk_len,
    slots,
    slots_per_chunk,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VARLEN: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    n_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_s = (tl.program_id(0) // n_blocks).to(tl.int64)
    first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
    slot0 = first_slot(i_s, first, chunk_len // slots_per_chunk, slots, VARLEN, 2 if SAVE else 1)
    A, B, O = empty_state(P, BLOCK_C)
    if HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_s * (3 * P * C), c, C, P, BLOCK_C)
    decay, decay_low, decay_exponent = load_decay(w, c, chunk_len.to(tl.float64), C, P, BLOCK_C)
    rest = zeros(2 * P, BLOCK_C)
    p_slot = states + slot0 * (3 * P * C)
    if length > 0:
        store_triple(p_slot, c, A, B, O, C, P, BLOCK_C)
    for _ in range(chunk_len, length, chunk_len):
        p_slot += slots_per_chunk * (3 * P * C)
        A_chunk, B_chunk, O_chunk = load_triple(p_slot, c, C, P, BLOCK_C)
        A_next = ()
        B_next = ()
        O_next = ()
        A_rest = ()
        B_rest = ()
        for p in tl.static_range(P):
            decayed = O[p] + decay_exponent[p]
            top = tl.maximum(decayed, O_chunk[p])
            past = decay[p] * pow2(decayed - top)
            now = pow2(O_chunk[p] - top)
            A_joined = tl.fma(rest[p], past, A_chunk[p] * now)
            B_joined = tl.fma(rest[P + p], past, B_chunk[p] * now)
            a, b, o, a_rest, b_rest = exact_carry(
                A[p], B[p], O[p], A_joined, B_joined, top, decay[p], decay_low[p], decay_exponent[p]
            )
            A_next += (a,)
            B_next += (b,)
            O_next += (o,)
            A_rest += (a_rest,)
            B_rest += (b_rest,)
        A = A_next
        B = B_next
        O = O_next
        rest = A_rest + B_rest
        store_triple(p_slot, c, A, B, O, C, P, BLOCK_C)
