"""Where the tokens of a sequence lie: rows of batches or of packed sequences, in either direction.

A program along T works on one chunk of one sequence. With packed sequences the chunks of all of them are numbered
through: those of sequence s begin at `cu_seqlens[s] // chunk_len + s`. That leaves every sequence room enough, because
floor(a + n) - floor(a) + 1 >= ceil(n), and needs neither a table nor a look at `cu_seqlens` on the host; a number that
no chunk has costs a program that returns at once. States are numbered in the same way.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_at(cu_seqlens, index, chunk_len, n_sequences):
    """The last s with cu_seqlens[s] // chunk_len + s <= index, by bisection."""
    low = index * 0
    high = low + n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle).to(tl.int64) // chunk_len + middle
        low = tl.where(begins <= index, middle, low)
        high = tl.where(begins <= index, high, middle)
    return low


@triton.jit
def locate_sequence(cu_seqlens, i_s, T, VARLEN: tl.constexpr):
    """First row (int64) and number of tokens of sequence i_s (int64)."""
    if VARLEN:
        first = tl.load(cu_seqlens + i_s).to(tl.int64)
        return first, (tl.load(cu_seqlens + i_s + 1).to(tl.int64) - first).to(tl.int32)
    else:
        return i_s * T, T


@triton.jit
def locate_chunk(
    cu_seqlens, index, T, chunk_len, n_chunks, n_sequences,
    VARLEN: tl.constexpr, SINGLE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Of the index-th program along T: sequence (int64), its first row and its tokens; the row of the first token in
    running order, and which tokens the chunk has: from begin to end - 1.
    """
    if SINGLE:
        i_s = index.to(tl.int64)
        first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
        i_n = index * 0
    elif VARLEN:
        i_s = sequence_at(cu_seqlens, index, chunk_len, n_sequences).to(tl.int64)
        first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
        i_n = (index - (first // chunk_len + i_s)).to(tl.int32)
    else:
        i_s = (index // n_chunks).to(tl.int64)
        first, length = locate_sequence(cu_seqlens, i_s, T, VARLEN)
        i_n = index % n_chunks
    begin = i_n * chunk_len
    end = tl.minimum(begin + chunk_len, length)
    return i_s, first, length, first_row(first, length, REVERSE), begin, end


@triton.jit
def first_slot(i_s, first, slot_len, slots, VARLEN: tl.constexpr, SPARE: tl.constexpr):
    """Number of a sequence's first state. One is kept every slot_len tokens, and with SPARE = 2 one at the end."""
    if VARLEN:
        return first // slot_len + i_s * SPARE
    else:
        return i_s * slots


@triton.jit
def first_row(first, length, REVERSE: tl.constexpr):
    """Row of the first token to be processed; the next ones follow in steps of -1 if REVERSE, of 1 otherwise."""
    if REVERSE:
        return first + length - 1
    else:
        return first
