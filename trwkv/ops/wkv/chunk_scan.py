"""Between the two walks of forward and backward: what enters each chunk, from what each chunk adds.

A perspective's channel is a lane here, whatever perspective it belongs to: [3, P, C] is read as [3, LANES]. The chunks
follow one another, so the triples of the next AHEAD are loaded while these are joined: a trip to memory takes longer
than a chunk's arithmetic.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    carry,
    empty_state,
    exact_carry,
    load_decay,
    load_triple,
    load_user_state,
    pow2,
)
from trwkv.ops.wkv.kernel_rows import first_slot, locate_sequence


@triton.jit
def locate_chunks(
    cu_seqlens, T, chunk_len, n_chunks, LANES: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr
):
    """This program's lanes and sequence (int64), the slot of that's first chunk, and how many chunks it has."""
    n_blocks: tl.constexpr = (LANES + BLOCK - 1) // BLOCK
    lane = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    i_s = (tl.program_id(0) // n_blocks).to(tl.int64)
    first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
    slot0 = first_slot(i_s, first, chunk_len, n_chunks, VARLEN, 1)
    return lane, i_s, slot0, (length + chunk_len - 1) // chunk_len


@triton.jit
def load_chunks(ptr, lane, missing, STRIDE: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr):
    """AHEAD triples [3, LANES] of successive chunks, one after the other; zeros from the first `missing` one on."""
    out = ()
    for j in tl.static_range(AHEAD):
        is_there = (lane < LANES) & (j < missing)
        for i in tl.static_range(3):
            out += (tl.load(ptr + j * STRIDE + i * LANES + lane, mask=is_there, other=0.0),)
    return out


@triton.jit
def store_chunk(ptr, lane, x, y, z, is_there, LANES: tl.constexpr):
    is_there = (lane < LANES) & is_there
    tl.store(ptr + lane, x, mask=is_there)
    tl.store(ptr + LANES + lane, y, mask=is_there)
    tl.store(ptr + 2 * LANES + lane, z, mask=is_there)


@triton.jit(do_not_specialize=["T", "chunk_len", "n_chunks"])
def wkv_chunk_scan_kernel(
    w,  # [LANES]
    initial_state,  # [N, 3, LANES], as the user has it
    cu_seqlens,  # [N + 1] if VARLEN
    chunks,  # [programs along T, 3, LANES]: what each chunk adds; replaced by the state before it
    T,
    chunk_len,
    n_chunks,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    lane, i_s, slot0, n = locate_chunks(cu_seqlens, T, chunk_len, n_chunks, LANES, BLOCK, VARLEN)
    p_chunk = chunks + slot0 * (3 * LANES)
    coming = load_chunks(p_chunk, lane, n - 1, 3 * LANES, AHEAD, LANES)
    A, B, O = empty_state(1, BLOCK)
    if HAS_INITIAL:
        A, B, O = load_user_state(initial_state + i_s * (3 * LANES), lane, LANES, 1, BLOCK)
    A, B, O = A[0], B[0], O[0]
    decay, decay_low, exponent = load_decay(w, lane, chunk_len.to(tl.float64), LANES, 1, BLOCK)
    decay, decay_low, exponent = decay[0], decay_low[0], exponent[0]
    A_rest = tl.zeros([BLOCK], tl.float32)
    B_rest = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n, AHEAD):
        chunk = coming
        p_next = p_chunk + AHEAD * (3 * LANES)
        coming = load_chunks(p_next, lane, n - 1 - i - AHEAD, 3 * LANES, AHEAD, LANES)
        for j in tl.static_range(AHEAD):
            store_chunk(p_chunk + j * (3 * LANES), lane, A, B, O, i + j < n, LANES)
            # Beyond the last chunk it joins nothing that is stored.
            O_chunk = chunk[3 * j + 2]
            top = tl.maximum(O + exponent, O_chunk)
            past = decay * pow2(O + exponent - top)
            now = pow2(O_chunk - top)
            A_joined = tl.fma(A_rest, past, chunk[3 * j] * now)
            B_joined = tl.fma(B_rest, past, chunk[3 * j + 1] * now)
            A, B, O, A_rest, B_rest = exact_carry(
                A, B, O, A_joined, B_joined, top, decay, decay_low, exponent
            )
        p_chunk = p_next


@triton.jit(do_not_specialize=["T", "chunk_len", "n_chunks"])
def wkv_chunk_bwd_scan_kernel(
    w,  # [LANES]
    cu_seqlens,  # [N + 1] if VARLEN
    adjoints,  # [programs along T, 3, LANES]: what each chunk but the first adds to that at its start; replaced by it
    T,
    chunk_len,
    n_chunks,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    VARLEN: tl.constexpr,
):
    lane, _, slot0, n = locate_chunks(cu_seqlens, T, chunk_len, n_chunks, LANES, BLOCK, VARLEN)
    if n <= 2:  # the last chunk has its adjoint, the first finds its own
        return
    p_chunk = adjoints + (slot0 + n - 1) * (3 * LANES)
    a, b, O = load_triple(p_chunk, lane, LANES, 1, BLOCK)
    a, b, O = a[0], b[0], O[0]
    p_chunk -= 3 * LANES
    coming = load_chunks(p_chunk, lane, n - 2, -3 * LANES, AHEAD, LANES)
    decay, decay_low, exponent = load_decay(w, lane, chunk_len.to(tl.float64), LANES, 1, BLOCK)
    decay, decay_low, exponent = decay[0], decay_low[0], exponent[0]
    a_rest = tl.zeros([BLOCK], tl.float32)
    b_rest = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n - 2, AHEAD):
        chunk = coming
        p_next = p_chunk - AHEAD * (3 * LANES)
        coming = load_chunks(p_next, lane, n - 2 - i - AHEAD, -3 * LANES, AHEAD, LANES)
        for j in tl.static_range(AHEAD):
            scale = pow2(chunk[3 * j + 2] + exponent - O)
            a_joined = tl.fma(a_rest * scale, decay, chunk[3 * j])
            b_joined = tl.fma(b_rest * scale, decay, chunk[3 * j + 1])
            a, a_rest = carry(a * scale, a_joined, decay, decay_low)
            b, b_rest = carry(b * scale, b_joined, decay, decay_low)
            O = chunk[3 * j + 2]
            store_chunk(p_chunk - j * (3 * LANES), lane, a, b, O, i + j < n - 2, LANES)
        p_chunk = p_next
