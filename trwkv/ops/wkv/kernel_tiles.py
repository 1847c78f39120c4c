"""k and v of the tokens of one tile, as the chunk kernels carry them from one tile to the next."""

import triton
import triton.language as tl


@triton.jit
def tile_source(k, v, c0, c, BLOCK_C: tl.constexpr, PAIRED: tl.constexpr):
    """k, v and channels as tiles are loaded. PAIRED: two of 16 bits as an int32, which stay in one register."""
    if PAIRED is not None:
        of_pairs: tl.constexpr = tl.pointer_type(tl.int32)
        return (
            k.to(of_pairs, bitcast=True),
            v.to(of_pairs, bitcast=True),
            c0 // 2 + tl.arange(0, BLOCK_C // 2),
        )
    else:
        return k, v, c


@triton.jit
def load_rows(
    ptr, row, c, missing, old, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of k or of v; `old`, whose registers they take, where tokens are `missing`."""
    WIDTH: tl.constexpr = 1 if PAIRED is None else 2
    is_there = c + missing * C < C // WIDTH  # not missing == 0: that is uniform, and copied for every load
    out = ()
    for j in tl.static_range(BLOCK_T):
        p_row = ptr + (row + j * STEP) * (C // WIDTH) + c
        out += (tl.load(p_row, mask=is_there, other=old[j]),)
    return out


@triton.jit
def no_rows(ptr, c, N: tl.constexpr):
    """What stands for rows at ptr before the first are loaded: zeros, never used."""
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros_like(c).to(ptr.dtype.element_ty),)
    return out


@triton.jit
def no_tile(source, BLOCK_T: tl.constexpr):
    """What stands for the tile before the first."""
    k, v, c = source
    return no_rows(k, c, BLOCK_T), no_rows(v, c, BLOCK_T)


@triton.jit
def load_tile(
    source, row, missing, old,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """k and v of BLOCK_T tokens, unless some are `missing`: then `old`, another tile, whose registers they take."""
    k, v, c = source
    old_k, old_v = old
    k_rows = load_rows(k, row, c, missing, old_k, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    v_rows = load_rows(v, row, c, missing, old_v, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    return k_rows, v_rows


@triton.jit
def prefetch_rows(
    ptr, row0, t, last, c0, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    STEP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Has the L2 cache fetch rows of WIDTH elements, those of tokens t .. t + BLOCK_T - 1 up to `last`. In one or two
    instructions: every lane asks for 32 bytes.
    """
    if PTX:
        SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        SECTORS: tl.constexpr = max(1, BLOCK_C * SIZE // 32)
        i = tl.arange(0, BLOCK_T * SECTORS)
        token = tl.minimum(t + i // SECTORS, last)  # no branch, and never an address outside
        at = tl.minimum(c0 + i % SECTORS * (BLOCK_C // SECTORS), C - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr + (row0 + token * STEP) * WIDTH + at],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def widen(x, PAIRED: tl.constexpr):
    """x in float32. PAIRED, a dtype: every int32 of x holds two such numbers, of one channel and the next."""
    if PAIRED == "bfloat16":
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
        return tl.interleave(even, odd)
    elif PAIRED == "float16":
        even = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.interleave(even, odd)
    else:
        return x.to(tl.float32)


@triton.jit
def of_pairs(x, y, INSTRUCTION: tl.constexpr):
    """An instruction that takes two numbers of 16 bits at once, from each of x and y."""
    return tl.inline_asm_elementwise(INSTRUCTION, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def extremes(rows, PAIRED: tl.constexpr, PTX: tl.constexpr, N: tl.constexpr):
    """The largest and the smallest of N rows as `widen` takes them, in float32; NaN where one of them is NaN."""
    if PAIRED is not None and PTX:
        is_brain: tl.constexpr = PAIRED == "bfloat16"
        LARGER: tl.constexpr = "max.NaN.bf16x2 $0, $1, $2;" if is_brain else "max.NaN.f16x2 $0, $1, $2;"
        SMALLER: tl.constexpr = "min.NaN.bf16x2 $0, $1, $2;" if is_brain else "min.NaN.f16x2 $0, $1, $2;"
        high = rows[0]
        low = rows[0]
        for j in tl.static_range(1, N):
            high = of_pairs(high, rows[j], LARGER)
            low = of_pairs(low, rows[j], SMALLER)
        return widen(high, PAIRED), widen(low, PAIRED)
    else:
        high = widen(rows[0], PAIRED)
        low = high
        for j in tl.static_range(1, N):
            row = widen(rows[j], PAIRED)
            high = tl.maximum(high, row, propagate_nan=tl.PropagateNan.ALL)
            low = tl.minimum(low, row, propagate_nan=tl.PropagateNan.ALL)
        return high, low
