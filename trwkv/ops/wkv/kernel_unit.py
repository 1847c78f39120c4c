"""The exponent that a tile computes in, and whether its fast path may.

Between two fast tiles all perspectives have one exponent, O[0]: the state is *joint* (the other entries of O mean
nothing then). Otherwise, as on the exact path, each has its own, and B is in [0.5, 1) or the state empty.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_math import (
    EMPTY,
    SAFE_BITS,
    SAFE_DEPTH,
    SAFE_TOP,
    exponent_near,
    normalise,
    pow2,
    taken,
)
from trwkv.ops.wkv.kernel_tiles import extremes


@triton.jit
def exponents(O, is_joint, P: tl.constexpr):
    """The exponent of each perspective."""
    out = ()
    for p in tl.static_range(P):
        out += (tl.where(is_joint, O[0], O[p]),)
    return out


@triton.jit
def scaled(A, B, rest, scale, P: tl.constexpr):
    """A state or an adjoint and its rest, which has P numbers of each kind, times a factor for each perspective."""
    A_out = ()
    B_out = ()
    rest_out = ()
    for p in tl.static_range(P):
        A_out += (A[p] * scale[p],)
        B_out += (B[p] * scale[p],)
    for i in tl.static_range(len(rest)):
        rest_out += (rest[i] * scale[i % P],)
    return A_out, B_out, rest_out


@triton.jit
def split(A, B, O, rest, is_joint, P: tl.constexpr):
    """The state with an exponent for each perspective."""
    O = exponents(O, is_joint, P)
    scale = ()
    O_out = ()
    for p in tl.static_range(P):
        p_scale, o = normalise(A[p], B[p], O[p])
        scale += (p_scale,)
        O_out += (o,)
    A, B, rest = scaled(A, B, rest, scale, P)
    return A, B, O_out, rest


@triton.jit
def join(A, B, O, rest, P: tl.constexpr):
    """A split state made joint, in the largest of its exponents, or left as it is where others are too far below that;
    the largest, and whether it is joint.
    """
    bound = O[0]
    for p in tl.static_range(1, P):
        bound = tl.maximum(bound, O[p])
    is_near = (O[0] - bound >= -SAFE_BITS) | (O[0] == EMPTY)
    for p in tl.static_range(1, P):
        is_near = is_near & ((O[p] - bound >= -SAFE_BITS) | (O[p] == EMPTY))
    is_joint = tl.min(is_near.to(tl.int32), 0) > 0
    scale = ()
    O_out = ()
    for p in tl.static_range(P):
        scale += (tl.where(is_joint, pow2(O[p] - bound), 1.0),)
        O_out += (tl.where(is_joint, bound, O[p]),)
    A, B, rest = scaled(A, B, rest, scale, P)
    return A, B, O_out, rest, bound, is_joint


@triton.jit
def enter_tile(
    A, B, O, rest, bound, is_joint, k_rows, is_full, fast,
    P: tl.constexpr, BLOCK_T: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The state as the tile of these rows takes it, and whether that is the fast path: then joint, in the tile's
    exponent, which no token exceeds, nor any perspective's sum (`bound` says what those reach); else split.

    The fast path it is if every sum in the tile stays within SAFE_BITS; not with NaN.
    """
    _, _, _, _, token_limit, carried_limit = fast
    k_max, k_min = extremes(k_rows, PAIRED, PTX, BLOCK_T)
    top = tl.maximum(exponent_near(k_max), bound, propagate_nan=tl.PropagateNan.ALL)
    depth = exponent_near(k_min) - top
    scale = pow2(O[0] - top)
    # One comparison for all: the compiler packs several into bits, at three times the cost.
    margin = B[0] * scale - taken(carried_limit[0])
    for p in tl.static_range(1, P):
        margin = tl.minimum(margin, B[p] * scale - taken(carried_limit[p]))
    is_safe = (depth >= taken(token_limit)) | (margin >= 0.0)
    is_safe = is_safe & (tl.abs(top) <= SAFE_TOP) & (depth >= -SAFE_DEPTH)
    is_fast = is_joint & is_full & (tl.min(is_safe.to(tl.int32), 0) > 0)
    if is_fast:
        A_in = ()
        B_in = ()
        O_in = ()
        rest_in = ()
        for p in tl.static_range(P):
            A_in += (A[p] * scale,)
            B_in += (B[p] * scale,)
            if p == 0:
                O_in += (top,)
            else:
                O_in += (O[p],)
        for i in tl.static_range(len(rest)):
            rest_in += (rest[i] * scale,)
    else:
        A_in, B_in, O_in, rest_in = split(A, B, O, rest, is_joint, P)
    return A_in, B_in, O_in, rest_in, is_fast
