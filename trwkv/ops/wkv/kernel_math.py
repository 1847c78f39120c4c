"""Device functions shared by the WKV kernels. Conventions and proofs: MATH.md.

Inside the kernels a state is (A, B, O): the true sums are A * 2^O and B * 2^O, O an integer held in float32, and B in
[0.5, 1) unless the state is empty (A = B = 0, O = EMPTY). Every number is a mantissa and an integer exponent, so
rescaling is exact: results do not depend, to the bit, on which stabiliser a tile happened to choose.

P perspectives are tuples of P tensors [BLOCK_C], unrolled at compile time.
"""

import triton
import triton.language as tl

from trwkv.ops._dispatch import is_interpreting
from trwkv.ops._interpreter import prepare_interpreter

if is_interpreting():
    prepare_interpreter()

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LO = tl.constexpr(1.9259629911266175e-08)  # what float32 leaves of it
LN2 = tl.constexpr(0.6931471805599453)
EMPTY = tl.constexpr(-1073741824.0)  # -2^30: below any reachable exponent, and additions to it stay harmless
EMPTY_EXP = tl.constexpr(-1e38)  # exponent of an empty state as the user sees it
K_LIMIT = tl.constexpr(8388608.0)  # 2^23: beyond it float32 exponents would stop being exact integers
SAFE_BITS = tl.constexpr(60.0)  # how far below the stabiliser a tile may reach on the fast path
SAFE_DEPTH = tl.constexpr(125.0)  # how far below it a token may be there that counts for nothing
SAFE_TOP = tl.constexpr(1048576.0)  # 2^20: how far from 0 the stabiliser may be on the fast path
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + MAGIC is x rounded to an integer, held in the lowest bits
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def pow2(n):
    """2^n exactly for integer-valued float32 n up to 127; 0 below -126."""
    biased = tl.maximum(n, -127.0) + (MAGIC + 127.0)  # no conversion: it is as slow as exp2
    return (biased.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def negative(x):
    """-x, which becomes part of the instruction that takes it; Triton's own is 0 - x, an instruction."""
    return x * -1.0


@triton.jit
def mantissa_of(k, exponent):
    """exp(k) / 2^exponent, exponent the integer next to k log2(e)."""
    return tl.exp2(tl.fma(k, LOG2E_LO, tl.fma(k, LOG2E, negative(exponent))))


@triton.jit
def exponent_near(k):
    """The integer next to k log2(e) for |k| up to 2 SAFE_TOP; beyond that, something beyond SAFE_TOP as well."""
    return tl.fma(k, LOG2E, MAGIC) - MAGIC


@triton.jit
def exp_near(k, top):
    """exp(k) / 2^top, with the bits of `split_k`, for |k| and |top| up to 2 SAFE_TOP, and of k nothing further below
    than SAFE_DEPTH: a normal number.
    """
    unit = MAGIC - top  # the same for all tokens of a tile
    rounded = tl.fma(k, LOG2E, unit)
    mantissa = mantissa_of(k, rounded - unit)
    # One instruction adds the exponent to the mantissa's own.
    bits = mantissa.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_k(k):
    """exp(k) = mantissa * 2^exponent, mantissa in about [0.7, 1.42], exponent an integer. NaN stays NaN."""
    k = tl.maximum(k, -K_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    k = tl.minimum(k, K_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.where(tl.abs(k) <= 2.0 * SAFE_TOP, exponent_near(k), tl.ceil(k * LOG2E))
    return mantissa_of(k, exponent), exponent


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def load_row(ptr, c, C: tl.constexpr, BLOCK_C: tl.constexpr, other):
    """BLOCK_C channels at ptr + c; the mask is compiled away where the blocks fit."""
    if C % BLOCK_C == 0:
        return tl.load(ptr + c)
    else:
        return tl.load(ptr + c, mask=c < C, other=other)


@triton.jit
def store_row(ptr, c, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    if C % BLOCK_C == 0:
        tl.store(ptr + c, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + c, x.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def split_log(x, steps):
    """exp(steps * x) = mantissa * 2^exponent for a natural log x; float64 mantissa in (0.5, 1]."""
    x2 = x.to(tl.float64) * LOG2E * steps
    exponent = tl.ceil(x2)
    return tl.exp2(x2 - exponent), exponent.to(tl.float32)


@triton.jit
def load_decay(w, c, steps, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per perspective, of the decay over so many steps: mantissa, what rounding took from it, exponent."""
    mantissa = ()
    low = ()
    exponent = ()
    for p in tl.static_range(P):
        exact, n = split_log(load_row(w + p * C, c, C, BLOCK_C, 0.0), steps)
        rounded = exact.to(tl.float32)
        mantissa += (rounded,)
        low += ((exact - rounded.to(tl.float64)).to(tl.float32),)
        exponent += (n,)
    return mantissa, low, exponent


@triton.jit
def load_vectors(w, u, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """Per perspective: mantissas and exponents of the decays of one step and of BLOCK_T steps, and of the bonus.

    The decay of BLOCK_T steps comes with what rounding took from it.
    """
    decay = ()
    decay_exponent = ()
    bonus = ()
    bonus_exponent = ()
    for p in tl.static_range(P):
        exact, n = split_log(load_row(w + p * C, c, C, BLOCK_C, 0.0), 1.0)
        decay += (exact.to(tl.float32),)
        decay_exponent += (n,)
        exact, n = split_log(load_row(u + p * C, c, C, BLOCK_C, 0.0), 1.0)
        bonus += (exact.to(tl.float32),)
        bonus_exponent += (n,)
    tile_decay, tile_decay_low, tile_exponent = load_decay(w, c, BLOCK_T * 1.0, C, P, BLOCK_C)
    return decay, decay_exponent, tile_decay, tile_decay_low, tile_exponent, bonus, bonus_exponent


@triton.jit
def fast_vectors(vectors, P: tl.constexpr, BLOCK_T: tl.constexpr):
    """What the fast path takes of them, as plain numbers: decay, bonus, decay of a tile and its remainder; and in the
    tile's exponent what tokens (a power of two, of them all), or else the state (a number), may not fall below.
    """
    decay, decay_exponent, tile_decay, tile_decay_low, tile_exponent, bonus, bonus_exponent = vectors
    W = ()
    U = ()
    tile_W = ()
    tile_W_low = ()
    token_limit = tl.zeros_like(decay[0]) - SAFE_BITS
    carried_limit = ()
    for p in tl.static_range(P):
        W += (decay[p] * pow2(decay_exponent[p]),)
        U += (bonus[p] * pow2(bonus_exponent[p]),)
        size = pow2(tile_exponent[p])
        tile_W += (tile_decay[p] * size,)
        tile_W_low += (tile_decay_low[p] * size,)
        is_bounded = (bonus_exponent[p] <= SAFE_BITS) & (BLOCK_T * decay_exponent[p] <= SAFE_BITS)
        limit = tl.where(is_bounded, -SAFE_BITS, float("inf"))
        token_limit = tl.maximum(token_limit, limit - tl.minimum(bonus_exponent[p], 0.0))
        limit += tl.maximum(bonus_exponent[p], 0.0) - BLOCK_T * (decay_exponent[p] - 1.0)
        carried_limit += (tl.where(limit <= 1.0, pow2(tl.minimum(limit, 1.0)), float("inf")),)
    return W, U, tile_W, tile_W_low, token_limit, carried_limit


@triton.jit
def normalise(A, B, O):
    """The power of two that brings B into [0.5, 1), and the exponent then: EMPTY if A = B = 0."""
    size = tl.where(B == 0.0, tl.abs(A), tl.abs(B))
    shift = (((size.to(tl.int32, bitcast=True) >> 23) & 255) - 126).to(tl.float32)
    return pow2(-shift), tl.where(size == 0.0, EMPTY, O + shift)


@triton.jit
def put_away(fast, ptr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """`fast_vectors` with what a tile takes once only in memory, at ptr [3 P + 1, BLOCK_C]: pointers in its place."""
    W, U, tile_W, tile_W_low, token_limit, carried_limit = fast
    ptr += tl.arange(0, BLOCK_C)
    tl.store(ptr, token_limit)
    p_tile_W = ()
    p_tile_W_low = ()
    p_carried_limit = ()
    for p in tl.static_range(P):
        tl.store(ptr + (3 * p + 1) * BLOCK_C, tile_W[p])
        tl.store(ptr + (3 * p + 2) * BLOCK_C, tile_W_low[p])
        tl.store(ptr + (3 * p + 3) * BLOCK_C, carried_limit[p])
        p_tile_W += (ptr + (3 * p + 1) * BLOCK_C,)
        p_tile_W_low += (ptr + (3 * p + 2) * BLOCK_C,)
        p_carried_limit += (ptr + (3 * p + 3) * BLOCK_C,)
    return W, U, p_tile_W, p_tile_W_low, ptr, p_carried_limit


@triton.jit
def taken(x):
    """x, or what it points at."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x


@triton.jit
def exponent_above(x):
    """The n with x in [2^(n - 1), 2^n), for x a normal number, above 0."""
    field = x.to(tl.int32, bitcast=True) >> 23
    return (field | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 126.0)


@triton.jit
def carry(x, joined, decay, decay_low):
    """x * (decay + decay_low) + joined, and what rounding took from it."""
    joined = tl.fma(x, decay_low, joined)
    total = tl.fma(x, decay, joined)
    return total, tl.fma(x, decay, negative(total)) + joined


@triton.jit
def zeros(N: tl.constexpr, BLOCK_C: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros([BLOCK_C], tl.float32),)
    return out


@triton.jit
def ones(N: tl.constexpr, BLOCK_C: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out += (tl.full([BLOCK_C], 1.0, tl.float32),)
    return out


@triton.jit
def empty_state(P: tl.constexpr, BLOCK_C: tl.constexpr):
    A = ()
    B = ()
    O = ()
    for _ in tl.static_range(P):
        A += (tl.zeros([BLOCK_C], tl.float32),)
        B += (tl.zeros([BLOCK_C], tl.float32),)
        O += (tl.full([BLOCK_C], EMPTY, tl.float32),)
    return A, B, O


@triton.jit
def load_triple(ptr, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Three planes [3, P, C] as they are."""
    X = ()
    Y = ()
    Z = ()
    for p in tl.static_range(P):
        X += (load_row(ptr + p * C, c, C, BLOCK_C, 0.0),)
        Y += (load_row(ptr + (P + p) * C, c, C, BLOCK_C, 0.0),)
        Z += (load_row(ptr + (2 * P + p) * C, c, C, BLOCK_C, 0.0),)
    return X, Y, Z


@triton.jit
def store_triple(ptr, c, X, Y, Z, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    for p in tl.static_range(P):
        store_row(ptr + p * C, c, X[p], C, BLOCK_C)
        store_row(ptr + (P + p) * C, c, Y[p], C, BLOCK_C)
        store_row(ptr + (2 * P + p) * C, c, Z[p], C, BLOCK_C)


@triton.jit
def scale_exactly(x, scale):
    """float32 x times a float64 scale, rounded once: a rounded scale would err alike at every step of a decoding."""
    return (x.to(tl.float64) * scale).to(tl.float32)


@triton.jit
def load_user_state(ptr, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(num, den, exp), exp a natural log -> (A, B, O)."""
    num, den, exp = load_triple(ptr, c, C, P, BLOCK_C)
    A = ()
    B = ()
    O = ()
    for p in tl.static_range(P):
        scale, exponent = split_log(exp[p], 1.0)
        shift, o = normalise(num[p], den[p], exponent)
        A += (scale_exactly(num[p] * shift, scale),)  # B may fall to 0.25: harmless, it is only a bound
        B += (scale_exactly(den[p] * shift, scale),)
        O += (o,)
    return A, B, O


@triton.jit
def user_exponent(O):
    """The natural-log exponent a user sees for O, rounded to float32, and 2^O / e^that in float64."""
    exact = O.to(tl.float64) * LN2
    exp = exact.to(tl.float32)
    scale = tl.exp2((exact - exp.to(tl.float64)) * LOG2E)
    is_empty = O == EMPTY
    return tl.where(is_empty, EMPTY_EXP, exp), tl.where(is_empty, 1.0, scale)


@triton.jit
def store_user_state(ptr, c, A, B, O, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr):
    for p in tl.static_range(P):
        exp, scale = user_exponent(O[p])
        store_row(ptr + p * C, c, scale_exactly(A[p], scale), C, BLOCK_C)
        store_row(ptr + (P + p) * C, c, scale_exactly(B[p], scale), C, BLOCK_C)
        store_row(ptr + (2 * P + p) * C, c, exp, C, BLOCK_C)


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)); beyond +-87 that of +-87, next to 1 or to the smallest normal number. NaN stays NaN."""
    x = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 87.0, propagate_nan=tl.PropagateNan.ALL)
    mantissa, exponent = split_k(negative(x))
    return reciprocal(tl.fma(mantissa, pow2(exponent), 1.0), PTX)


@triton.jit
def exact_output(A, B, O, bonus, bonus_exponent, e, k_exponent, v):
    """One output of one perspective, whatever the exponents. Returns numerator, denominator and their exponent."""
    token_exponent = k_exponent + bonus_exponent
    top = tl.maximum(O, token_exponent)
    past = pow2(O - top)
    now = bonus * pow2(token_exponent - top)
    return tl.fma(now, e * v, A * past), tl.fma(now, e, B * past), top


@triton.jit
def exact_update(A, B, O, A_joined, B_joined, decay, decay_exponent, e, k_exponent, v):
    """One step of one perspective's state and of the part of it that joined in this tile, whatever the exponents."""
    decayed = O + decay_exponent
    top = tl.maximum(decayed, k_exponent)
    past = pow2(decayed - top)
    now = pow2(k_exponent - top)
    ev = (e * v) * now
    e = e * now
    A = tl.fma(A * past, decay, ev)
    B = tl.fma(B * past, decay, e)
    A_joined = tl.fma(A_joined * past, decay, ev)
    B_joined = tl.fma(B_joined * past, decay, e)
    scale, O = normalise(A, B, top)
    return A * scale, B * scale, O, A_joined * scale, B_joined * scale


@triton.jit
def exact_carry(A, B, O, A_joined, B_joined, O_joined, tile_decay, tile_decay_low, tile_exponent):
    """The state a tile's steps after (A, B, O), what rounding took from it, and their exponent."""
    decayed = O + tile_exponent
    top = tl.maximum(decayed, O_joined)
    past = pow2(decayed - top)
    now = pow2(O_joined - top)
    A, A_rest = carry(A * past, A_joined * now, tile_decay, tile_decay_low)
    B, B_rest = carry(B * past, B_joined * now, tile_decay, tile_decay_low)
    scale, O = normalise(A, B, top)
    return A * scale, B * scale, O, A_rest * scale, B_rest * scale
